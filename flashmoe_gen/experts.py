"""The weights of a rank's experts, in the layout checkpoints use, without copies."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from . import arrays
from .errors import SpecError
from .spec import MoESpec


@dataclass(frozen=True, eq=False)
class BoundExperts:
    """Checked weights: their addresses, which are good as long as this lives.

    Attributes:
        fields: the weight fields of ``MoEArgs``.
        views: the arrays behind them.
        identities: what was bound; see :func:`flashmoe_gen.arrays.identity`.
        lent: whether some of it is there only as long as its view.
    """

    fields: dict[str, int]
    views: tuple[arrays.View, ...]
    identities: tuple[Any, ...]
    lent: bool


class Experts:
    """Weights of the experts a rank holds, in slot order: nn.Linear layout, K contiguous, never copied.

    Arrays may be written in place between calls, and a framework may replace the memory of a parameter: every call looks at
    where they are. What lends its memory through DLPack is asked for it at every call, and lends it until the kernel has run.

    Args:
        gate, up: ``[E_local, I, H]``; a vanilla MLP has no gate.
        down: ``[E_local, H, I]``.
        gate_up: gate and up in one array ``[E_local, 2I, H]`` instead of ``gate`` and ``up``.
        gate_up_layout: ``"concat"`` (gate rows first, as vLLM's w13) or ``"interleaved"`` (gate, up, gate, up, ..., as gpt-oss).
        gate_bias, up_bias: ``[E_local, I]``; gate_up_bias: ``[E_local, 2I]`` in the layout of ``gate_up``.
        down_bias: ``[E_local, H]``.

    All are of the layer's dtype; axes other than the last may be strided. They are checked by the layer that uses them.

    Raises:
        SpecError: arguments that contradict each other.
    """

    def __init__(
        self,
        *,
        gate: Any = None,
        up: Any = None,
        down: Any,
        gate_up: Any = None,
        gate_up_layout: Literal["concat", "interleaved"] = "concat",
        gate_bias: Any = None,
        up_bias: Any = None,
        gate_up_bias: Any = None,
        down_bias: Any = None,
    ) -> None:
        if gate_up_layout not in ("concat", "interleaved"):
            raise SpecError(f"gate_up_layout={gate_up_layout!r} is not valid. Must be 'concat' or 'interleaved'.")
        if gate_up is not None and (gate is not None or up is not None):
            raise SpecError("gate_up is not valid together with gate or up: it holds both.")
        if gate_up_bias is not None and (gate_bias is not None or up_bias is not None):
            raise SpecError("gate_up_bias is not valid together with gate_bias or up_bias: it holds both.")
        if gate_up is None and up is None:
            raise SpecError("up= is missing. Pass gate= and up=, gate_up=, or (for a vanilla MLP) up= alone.")
        self._arrays = {
            "gate": gate, "up": up, "down": down, "gate_up": gate_up,
            "gate_bias": gate_bias, "up_bias": up_bias, "gate_up_bias": gate_up_bias, "down_bias": down_bias,
        }  # fmt: skip
        self._interleaved = gate_up_layout == "interleaved"
        self._bound: dict[tuple[Any, ...], BoundExperts] = {}

    def __repr__(self) -> str:
        parts = [f"{name}={_described(array)}" for name, array in self._arrays.items() if array is not None]
        layout = "interleaved" if self._interleaved else "concat"
        if self._arrays["gate_up"] is not None:
            parts.append(f"gate_up_layout={layout!r}")
        return f"Experts({', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        layout: Literal["concat", "interleaved"] = "interleaved" if self._interleaved else "concat"
        return Experts(**copy.deepcopy(self._arrays, memo), gate_up_layout=layout)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bound": {}}  # addresses of this process

    def bind(self, spec: MoESpec, local_experts: int, device: str, stream: arrays.Ordering = arrays.unordered) -> BoundExperts:
        """The weights of a rank that holds ``local_experts`` experts on ``device``: the same object while nothing has moved.

        ``stream`` gives DLPack's name of what waits until the memory of foreign arrays is ready; asked only when something moved.

        Raises:
            SpecError: an array is missing, not wanted, or of the wrong device, shape, dtype or strides; names it.
        """
        key = (spec.hidden_size, spec.intermediate_size, spec.dtype, spec.mlp, spec.bias, local_experts, device)
        identities = tuple([arrays.identity(array) for array in self._arrays.values() if array is not None])
        bound = self._bound.get(key)
        if bound is None or bound.identities != identities:
            views: dict[str, arrays.View] = {}
            look = _Check(self._arrays, self._interleaved, {"device": device, "stream": stream()}, views)
            fields = look.fields(spec, local_experts)
            lent = any(view.capsule is not None for view in views.values())
            bound = BoundExperts(fields, tuple(views.values()), identities, lent)
            if not lent:
                self._bound[key] = bound
        return bound


def _described(array: Any) -> str:
    try:
        shape = "x".join(map(str, array.shape))
        dtype = str(array.dtype).removeprefix("torch.")
    except Exception:  # what has none, or not yet
        return type(array).__name__
    return f"{type(array).__name__}[{dtype} {shape}]"


@dataclass
class _Check:
    """One look at all arrays."""

    _arrays: dict[str, Any]
    _interleaved: bool
    _where: dict[str, Any]
    _views: dict[str, arrays.View]

    def fields(self, spec: MoESpec, experts: int) -> dict[str, int]:
        gated = spec.mlp == "gated"
        joined = self._arrays["gate_up"] is not None
        if not gated and (joined or self._arrays["gate"] is not None):
            raise SpecError("mlp='vanilla' has no gate: pass up= and down= alone.")
        if gated and not joined and self._arrays["gate"] is None:
            raise SpecError("gate= is missing: mlp='gated' needs gate= and up=, or gate_up=.")
        hidden, inner = spec.hidden_size, spec.intermediate_size
        fields = self._matrix(spec, "down", (experts, hidden, inner))
        if joined:
            fields |= self._pair(spec, "gate_up", (experts, 2 * inner, hidden))
        else:
            fields |= self._matrix(spec, "up", (experts, inner, hidden))
            if gated:
                fields |= self._matrix(spec, "gate", (experts, inner, hidden))
        given = [name for name in ("gate_bias", "up_bias", "gate_up_bias", "down_bias") if self._arrays[name] is not None]
        if not spec.bias:
            if given:
                raise SpecError(f"{given[0]}= was passed, but the spec says bias=False.")
            return fields
        fields |= self._vector(spec, "down_bias", (experts, hidden))
        if self._arrays["gate_up_bias"] is not None:
            if not gated:
                raise SpecError("gate_up_bias= is not valid for mlp='vanilla': pass up_bias=.")
            return fields | self._pair_bias(spec, (experts, 2 * inner))
        fields |= self._vector(spec, "up_bias", (experts, inner))
        return fields | (self._vector(spec, "gate_bias", (experts, inner)) if gated else {})

    def _view(self, spec: MoESpec, name: str, shape: tuple[int, ...]) -> arrays.View:
        if self._arrays[name] is None:
            raise SpecError(f"{name}= is missing. Must be {shape} of {spec.dtype}.")
        view = arrays.checked(self._arrays[name], name, shape, spec.dtype, **self._where, contiguous=False)
        self._views[name] = view
        return view

    def _matrix(self, spec: MoESpec, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        found = self._view(spec, name, shape)
        vector = 16 // spec.element.size
        if any(stride % vector for stride in found.strides[:2]) or found.pointer % 16:
            raise SpecError(f"{name} is not aligned: its rows must start at multiples of 16 bytes. Pass a contiguous copy.")
        expert, row = (stride * spec.element.size for stride in found.strides[:2])
        return {name: found.pointer, f"{name}_expert_stride": expert, f"{name}_row_stride": row}

    def _vector(self, spec: MoESpec, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        found = self._view(spec, name, shape)
        size = spec.element.size
        return {name: found.pointer, f"{name}_expert_stride": found.strides[0] * size, f"{name}_stride": size}

    def _pair(self, spec: MoESpec, name: str, shape: tuple[int, ...]) -> dict[str, int]:
        both = self._matrix(spec, name, shape)
        row = both["gate_up_row_stride"]
        apart = row if self._interleaved else row * spec.intermediate_size
        step = 2 * row if self._interleaved else row
        expert = both["gate_up_expert_stride"]
        return {
            "gate": both["gate_up"], "gate_expert_stride": expert, "gate_row_stride": step,
            "up": both["gate_up"] + apart, "up_expert_stride": expert, "up_row_stride": step,
        }  # fmt: skip

    def _pair_bias(self, spec: MoESpec, shape: tuple[int, ...]) -> dict[str, int]:
        found = self._view(spec, "gate_up_bias", shape)
        size = spec.element.size
        apart, step = (size, 2 * size) if self._interleaved else (spec.intermediate_size * size, size)
        expert = found.strides[0] * size
        return {
            "gate_bias": found.pointer, "gate_bias_expert_stride": expert, "gate_bias_stride": step,
            "up_bias": found.pointer + apart, "up_bias_expert_stride": expert, "up_bias_stride": step,
        }  # fmt: skip
