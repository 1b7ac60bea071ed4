"""The layer in NumPy float64: the judge of every test. Plain on purpose; read :func:`route` and :func:`moe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SpecError
from .spec import MoESpec

F64 = npt.NDArray[np.float64]
Experts = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]

_quiet = np.errstate(over="ignore", invalid="ignore")  # infinite and NaN inputs have results too
_erfc = np.vectorize(math.erfc, otypes=[np.float64])  # SciPy is not a dependency


def _sigmoid(z: F64) -> F64:
    result: F64 = np.exp(-np.logaddexp(0.0, -z))  # no overflow, and small values keep their relative precision
    return result


def _softmax(z: F64) -> F64:
    powers: F64 = np.exp(z - z.max(axis=1, keepdims=True))
    result: F64 = powers / powers.sum(axis=1, keepdims=True)
    return result


def _gelu(z: F64) -> F64:
    result: F64 = z * 0.5 * _erfc(-z / math.sqrt(2.0))  # 1 + erf cancels where z is far below 0
    return result


def _gelu_tanh(z: F64) -> F64:
    doubled = 2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)
    return z * _sigmoid(doubled)  # 1 + tanh(u) == 2 sigmoid(2 u), which does not cancel


_ACTIVATIONS: dict[str, Callable[[F64], F64]] = {
    "silu": lambda z: z * _sigmoid(z),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda z: np.maximum(z, 0.0),
    "identity": lambda z: z,
}


def _checked(name: str, array: npt.ArrayLike, *shape: int) -> npt.NDArray[Any]:
    """The array, if it has this shape; -1 fits any length."""
    array = np.asarray(array)
    if array.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("T" if want == -1 else str(want) for want in shape)
        raise SpecError(f"{name} of shape {array.shape} is not valid. Must be [{wanted}].")
    return array


def _f64(name: str, array: npt.ArrayLike, *shape: int) -> F64:
    return _checked(name, array, *shape).astype(np.float64)  # ml_dtypes.bfloat16 converts too


def _checked_ids(spec: MoESpec, topk_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    ids = _checked("topk_ids", topk_ids, -1, spec.top_k)
    if not np.issubdtype(ids.dtype, np.integer):
        raise SpecError(f"topk_ids of dtype {ids.dtype} is not valid. Must be integers.")
    if ids.size and ids.max() >= spec.num_experts:
        raise SpecError(
            f"topk_ids holds {ids.max()}, which is not valid. Must be below num_experts={spec.num_experts}."
        )
    return ids.astype(np.int64)


def _best(scores: F64, count: int, last: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64]:
    """Indices of the ``count`` largest along the last axis, in descending order, ties to the lowest index.

    A NaN comes after every number, and what is ``last`` after all the rest.
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    if last is not None:
        moved = np.argsort(np.take_along_axis(last, order, axis=-1), axis=-1, kind="stable")
        order = np.take_along_axis(order, moved, axis=-1)
    return order[..., :count]


def _outside_top_groups(spec: MoESpec, scores: F64) -> npt.NDArray[np.bool_]:
    """Experts outside the groups whose best expert, or sum of the two best, is largest."""
    share = spec.num_experts // spec.num_groups
    grouped = scores.reshape(len(scores), spec.num_groups, share)
    best = np.take_along_axis(grouped, _best(grouped, 1 if spec.group_score == "max" else 2), axis=2)
    group_scores: F64 = best.sum(axis=2)  # NaN for inf - inf: such a group loses, as one without a number does
    outside = np.ones(group_scores.shape, dtype=bool)
    np.put_along_axis(outside, _best(group_scores, spec.top_groups), False, axis=1)
    return np.repeat(outside, share, axis=1)


@_quiet
def route(
    spec: MoESpec,
    x: npt.ArrayLike,
    router_weight: npt.ArrayLike,
    *,
    logit_bias: npt.ArrayLike | None = None,
    selection_bias: npt.ArrayLike | None = None,
) -> tuple[npt.NDArray[np.int32], F64]:
    """The experts of each token and their weights.

    Experts are chosen by score + selection bias, in descending order, ties to the lowest index; weights are the
    scores without that bias. Where only the order of scores matters (no selection bias, no sums of them) the
    logits are compared instead, so that scores which round to the same number do not tie. A NaN loses against every
    number, but is still an expert: what a group is worth does not depend on where in it a NaN is, and the NaN of a
    chosen group comes before every expert of the others.

    Args:
        spec: scoring, groups, renormalisation and scale are used.
        x: tokens, any floating type, ``[T, H]``; T may be zero.
        router_weight: any floating type, ``[E, H]``.
        logit_bias: added to the logits, ``[E]``.
        selection_bias: added to the scores for the choice only, ``[E]``.

    Returns:
        ``topk_ids`` int32 ``[T, k]`` and ``topk_weights`` float64 ``[T, k]``.

    Raises:
        SpecError: an array's shape does not fit the spec; names the array.
    """
    logits = (
        _f64("x", x, -1, spec.hidden_size) @ _f64("router_weight", router_weight, spec.num_experts, spec.hidden_size).T
    )
    if logit_bias is not None:
        logits += _f64("logit_bias", logit_bias, spec.num_experts)
    scores = _softmax(logits) if spec.scoring == "softmax" else _sigmoid(logits)
    choice = logits
    if selection_bias is not None:
        choice = scores + _f64("selection_bias", selection_bias, spec.num_experts)
    outside = None
    if spec.num_groups > 1:
        summed = selection_bias is None and spec.group_score == "top2_sum"
        outside = _outside_top_groups(spec, scores if summed else choice)
    ids = _best(choice, spec.top_k, last=outside)
    weights = np.take_along_axis(scores, ids, axis=1)
    if spec.renormalize:
        weights /= weights.sum(axis=1, keepdims=True) + 1e-20
    return ids.astype(np.int32), weights * spec.routed_scale


def _kept(spec: MoESpec, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which routes count: not masked, and within the capacity of their expert in (token, route) order."""
    kept = ids >= 0
    if spec.capacity is not None:
        for expert in range(spec.num_experts):
            token, slot = np.nonzero(ids == expert)  # in (token, route) order
            kept[token[spec.capacity :], slot[spec.capacity :]] = False
    return kept


def drops(spec: MoESpec, topk_ids: npt.ArrayLike) -> int:
    """How many routes of one rank's call find their expert full; masked routes do not count.

    Args:
        spec: ``capacity`` is used; 0 is returned when it is ``None``.
        topk_ids: any integer type, ``[T, k]``; negative ids are masked.

    Raises:
        SpecError: wrong shape or dtype, or an id that is no expert.
    """
    ids = _checked_ids(spec, topk_ids)
    return int((ids >= 0).sum() - _kept(spec, ids).sum())


class _Weights:
    """The arrays of all experts; hands out one expert in float64 at a time, so that a large model fits."""

    def __init__(self, spec: MoESpec, **arrays: Experts | None) -> None:
        wide, narrow = (spec.intermediate_size, spec.hidden_size), (spec.hidden_size, spec.intermediate_size)
        shapes = {"gate": wide, "up": wide, "down": narrow}
        self.shapes: dict[str, tuple[int, ...]] = {
            **shapes,
            **{f"{name}_bias": shape[:1] for name, shape in shapes.items()},
        }
        self.arrays = arrays
        for name, array in arrays.items():
            needed = (spec.mlp == "gated" or not name.startswith("gate")) and (spec.bias or not name.endswith("_bias"))
            if needed != (array is not None):
                verb = "is missing" if needed else "is not valid"
                raise SpecError(f"{name} {verb}: the spec has mlp={spec.mlp!r} and bias={spec.bias}.")
            if array is not None and len(array) != spec.num_experts:
                raise SpecError(f"{name} holds {len(array)} experts. Must hold num_experts={spec.num_experts}.")

    def linear(self, name: str, expert: int, rows: F64) -> F64:
        """``rows @ weight.T + bias`` of one expert."""
        weight, bias = self.arrays[name], self.arrays[f"{name}_bias"]
        assert weight is not None
        out: F64 = rows @ _f64(f"{name}[{expert}]", weight[expert], *self.shapes[name]).T
        if bias is not None:
            out += _f64(f"{name}_bias[{expert}]", bias[expert], *self.shapes[f"{name}_bias"])
        return out


def _mlp(spec: MoESpec, weights: _Weights, expert: int, rows: F64) -> F64:
    z_up = weights.linear("up", expert, rows)
    z = weights.linear("gate", expert, rows) if spec.mlp == "gated" else z_up
    if spec.gate_limit is not None:
        z = np.minimum(z, spec.gate_limit)
        z_up = np.clip(z_up, -spec.gate_limit, spec.gate_limit)
    inner: F64 = spec.swish_alpha * _ACTIVATIONS[spec.activation](spec.swish_beta * z)
    if spec.mlp == "gated":
        inner = inner * (z_up + spec.up_offset)
    return weights.linear("down", expert, inner)


@_quiet
def moe(
    spec: MoESpec,
    x: npt.ArrayLike,
    topk_ids: npt.ArrayLike,
    topk_weights: npt.ArrayLike,
    *,
    up: Experts,
    down: Experts,
    gate: Experts | None = None,
    gate_bias: Experts | None = None,
    up_bias: Experts | None = None,
    down_bias: Experts | None = None,
) -> F64:
    """The weighted sum of the experts of each token of one rank, over all experts in global order.

    Each weight array may also be a sequence of per-expert arrays; one expert at a time is converted to float64.
    Routes with a negative id contribute nothing. With ``spec.capacity`` an expert takes that many rows of this call
    in (token, route) order; later routes contribute nothing.

    Args:
        spec: the expert MLP, ``weight_on`` and ``capacity`` are used; ``max_tokens`` is not checked.
        x: tokens, any floating type, ``[T, H]``; T may be zero.
        topk_ids: any integer type, ``[T, k]``.
        topk_weights: any floating type, ``[T, k]``.
        up, gate: any floating type, ``[E, I, H]``; no ``gate`` for a vanilla MLP.
        down: ``[E, H, I]``.
        up_bias, gate_bias: ``[E, I]``, exactly when ``spec.bias``.
        down_bias: ``[E, H]``, exactly when ``spec.bias``.

    Returns:
        float64 ``[T, H]``.

    Raises:
        SpecError: an array is missing, superfluous or of a wrong shape, or an id is no expert; names the array.
    """
    tokens = _f64("x", x, -1, spec.hidden_size)
    ids = _checked_ids(spec, topk_ids)
    route_weights = _f64("topk_weights", topk_weights, -1, spec.top_k)
    for name, array in (("topk_ids", ids), ("topk_weights", route_weights)):
        if len(array) != len(tokens):
            raise SpecError(f"{name} holds {len(array)} tokens, but x holds {len(tokens)}.")
    weights = _Weights(spec, gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    kept = _kept(spec, ids)
    y = np.zeros_like(tokens)
    for expert in range(spec.num_experts):
        token, slot = np.nonzero(kept & (ids == expert))
        if not token.size:
            continue
        scale = route_weights[token, slot, None]
        if spec.weight_on == "input":
            out = _mlp(spec, weights, expert, tokens[token] * scale)
        else:
            out = _mlp(spec, weights, expert, tokens[token]) * scale
        for column in range(spec.top_k):  # a token may name an expert twice; within a column it cannot
            here = slot == column
            y[token[here]] += out[here]
    return y
