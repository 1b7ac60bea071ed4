"""What an MoE layer computes: :class:`MoESpec`, and which rank holds which expert: :class:`Placement`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .dtypes import DType, get_dtype
from .errors import SpecError, UnsupportedError
from .values import INT32_MAX, choice, flag, integer, number

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_WORLD_SIZE = 64
MAX_TOKENS = (1 << 24) - 1  # a list entry holds the token in 24 bits

_CHOICES = {
    "mlp": ("gated", "vanilla"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "identity"),
    "weight_on": ("output", "input"),
    "scoring": ("softmax", "sigmoid"),
    "group_score": ("max", "top2_sum"),
}


@dataclass(frozen=True)
class MoESpec:
    """One MoE layer: shapes, element type, the expert MLP and the routing function.

    With ``z_gate = gate @ x + gate_bias`` and ``z_up = up @ x + up_bias`` an expert computes

    * gated: ``down @ (swish_alpha * act(swish_beta * z_gate) * (z_up + up_offset)) + down_bias``
    * vanilla: ``down @ (swish_alpha * act(swish_beta * z_up)) + down_bias``

    and the layer returns ``sum_j weight_j * expert_{id_j}(x)``, or ``sum_j expert_{id_j}(weight_j * x)`` with
    ``weight_on="input"``. ``gate_limit`` clamps ``z_gate`` from above and ``z_up`` from both sides before the
    activation (gpt-oss).

    Args:
        hidden_size: H, elements of a token row; ``H * itemsize`` is a multiple of 16 bytes.
        intermediate_size: I, elements between the two expert GEMMs; a multiple of 16 bytes too.
        num_experts: E, 1 to 1024, over all ranks.
        top_k: routes per token, 1 to 32 and at most E.
        dtype: element type of tokens, weights and output.
        mlp: ``"gated"`` (gate, up, down) or ``"vanilla"`` (up, down).
        activation: ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"identity"``.
        bias: whether the expert matrices have biases.
        swish_alpha, swish_beta: scale of the activation's output and of its input.
        gate_limit: clamp before the activation, or ``None``; gated only.
        up_offset: added to ``z_up``; gated only.
        weight_on: whether a route's weight multiplies the expert's output or its input.
        scoring: how router logits become scores.
        renormalize: divide the chosen weights by their sum.
        num_groups, top_groups: group-limited top-k (DeepSeek-V2, arXiv:2405.04434): experts are chosen only from
            the ``top_groups`` best of ``num_groups`` equal groups.
        group_score: a group's score: its best expert (``"max"``, DeepSeek-V2) or the sum of its two best
            (``"top2_sum"``, DeepSeek-V3, arXiv:2412.19437). Default: ``"max"`` for softmax, else ``"top2_sum"``.
        routed_scale: multiplies every weight, after renormalisation.
        capacity: the most rows per (expert, source rank), below 2^31; later tokens are dropped. ``None`` is dropless.
        max_tokens: the most tokens of one rank in one call; sizes buffers, never the kernel.
        world_size: number of ranks, 1 to 8.
        batch_invariant: a token's bits depend on nothing but the token, its routes and the weights.

    Raises:
        SpecError: a value is out of range or a combination makes no sense; the message names it.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    dtype: str = "bfloat16"
    mlp: Literal["gated", "vanilla"] = "gated"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "identity"] = "silu"
    bias: bool = False
    swish_alpha: float = 1.0
    swish_beta: float = 1.0
    gate_limit: float | None = None
    up_offset: float = 0.0
    weight_on: Literal["output", "input"] = "output"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] | None = None
    routed_scale: float = 1.0
    capacity: int | None = None
    max_tokens: int
    world_size: int = 1
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        dtype = get_dtype(self.dtype)
        self._keep("dtype", dtype.name)
        for name, choices in _CHOICES.items():
            if name == "group_score" and self.group_score is None:
                self._keep(name, "max" if self.scoring == "softmax" else "top2_sum")
            self._keep(name, choice(name, getattr(self, name), choices))
        for name in ("hidden_size", "intermediate_size"):
            self._keep_integer(name, 1, 1 << 20)
            value = getattr(self, name)
            if value * dtype.size % 16:
                raise SpecError(
                    f"{name}={value} is not valid for {self.dtype}. "
                    f"Rows must be a multiple of 16 bytes, that is of {16 // dtype.size} elements."
                )
        self._keep_integer("num_experts", 1, MAX_EXPERTS)
        self._keep_integer("top_k", 1, min(MAX_TOP_K, self.num_experts))
        self._keep_integer("max_tokens", 1, MAX_TOKENS)
        self._keep_integer("world_size", 1, MAX_WORLD_SIZE)
        if self.capacity is not None:
            self._keep_integer("capacity", 1, INT32_MAX)
        for name in ("bias", "renormalize", "batch_invariant"):
            self._keep(name, flag(name, getattr(self, name)))
        for name in ("swish_alpha", "swish_beta", "up_offset", "routed_scale"):
            self._keep(name, number(name, getattr(self, name)))
        if self.gate_limit is not None:
            limit = number("gate_limit", self.gate_limit, words="a positive number or None", positive=True)
            self._keep("gate_limit", limit)
        if self.mlp == "vanilla" and (self.gate_limit is not None or self.up_offset != 0.0):
            raise SpecError("gate_limit and up_offset belong to a gated MLP; mlp='vanilla' has no gate.")
        self._check_groups()

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _keep_integer(self, name: str, low: int, high: int) -> None:
        self._keep(name, integer(name, getattr(self, name), low, high))

    def _check_groups(self) -> None:
        self._keep_integer("num_groups", 1, self.num_experts)
        self._keep_integer("top_groups", 1, self.num_groups)
        if self.num_experts % self.num_groups:
            raise SpecError(f"num_groups={self.num_groups} is not valid. Must divide num_experts={self.num_experts}.")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise SpecError(
                f"top_k={self.top_k} is not valid. Only {reachable} experts lie in top_groups={self.top_groups} "
                f"of num_groups={self.num_groups}."
            )
        if self.num_groups > 1 and self.group_score == "top2_sum" and self.num_experts // self.num_groups < 2:
            raise SpecError("group_score='top2_sum' needs at least two experts per group.")

    @property
    def element(self) -> DType:
        """The element type as a :class:`~flashmoe_gen.dtypes.DType`."""
        return get_dtype(self.dtype)

    def replace(self, **changes: Any) -> MoESpec:
        """A copy with some fields changed (validated again)."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf_config(
        cls, config: str | os.PathLike[str] | Mapping[str, Any], *, max_tokens: int, world_size: int = 1, **overrides: Any
    ) -> MoESpec:
        """The spec of a model from its Hugging Face ``config.json`` (a path, its folder, or the parsed dict).

        Args:
            config: path of ``config.json`` or of the folder holding it, or the dict itself.
            max_tokens, world_size: as in :class:`MoESpec`.
            overrides: any other :class:`MoESpec` field, e.g. ``dtype="float16"``.

        Raises:
            UnsupportedError: the model computes something the spec cannot express; names the config field.
            SpecError: the file cannot be read or lacks a field.
        """
        from .hf_config import spec_fields

        return cls(**{**spec_fields(config), **overrides}, max_tokens=max_tokens, world_size=world_size)

    @classmethod
    def preset(cls, name: str, *, max_tokens: int, world_size: int = 1, **overrides: Any) -> MoESpec:
        """The spec of a well-known model by name, e.g. ``"qwen3-30b-a3b"``; see :data:`flashmoe_gen.PRESETS`.

        Raises:
            SpecError: no preset of that name; the message lists them.
        """
        from .presets import preset_fields

        return cls(**{**preset_fields(name), **overrides}, max_tokens=max_tokens, world_size=world_size)


@dataclass(frozen=True)
class Placement:
    """Which rank holds which expert: for each rank the experts in its slots, in slot order.

    A rank's weight arrays are indexed by slot. Every expert appears exactly once; a rank may hold none.

    Args:
        slots_per_rank: ``slots_per_rank[rank][slot]`` is the expert in that slot.

    Raises:
        SpecError: an expert is missing, or is no integer.
        UnsupportedError: an expert appears more than once (replicas).
    """

    slots_per_rank: tuple[tuple[int, ...], ...]

    def __init__(self, slots_per_rank: Sequence[Sequence[int]]) -> None:
        try:
            listed = [list(rank) for rank in slots_per_rank]
        except TypeError:
            raise SpecError(f"slots_per_rank={slots_per_rank!r} is not valid. Must be a list of experts for each rank.") from None
        slots = tuple(
            tuple(integer(f"slots_per_rank[{r}][{s}]", expert, -MAX_EXPERTS, MAX_EXPERTS) for s, expert in enumerate(rank))
            for r, rank in enumerate(listed)
        )
        object.__setattr__(self, "slots_per_rank", slots)
        held = sorted(expert for rank in slots for expert in rank)
        if len(set(held)) != len(held):
            twice = next(a for a, b in zip(held, held[1:]) if a == b)
            raise UnsupportedError(f"slots_per_rank holds expert {twice} more than once. Replicated experts are not supported.")
        if held != list(range(len(held))):
            missing = min(set(range(len(held))).difference(held))
            raise SpecError(f"slots_per_rank is not valid. Expert {missing} of {len(held)} is missing.")

    @classmethod
    def default(cls, num_experts: int, world_size: int) -> Placement:
        """Equal contiguous blocks; the remainder goes to the first ranks.

        Raises:
            SpecError: a number is out of range.
        """
        num_experts = integer("num_experts", num_experts, 1, MAX_EXPERTS)
        world_size = integer("world_size", world_size, 1, MAX_WORLD_SIZE)
        share, extra = divmod(num_experts, world_size)
        starts = [rank * share + min(rank, extra) for rank in range(world_size + 1)]
        return cls([range(starts[rank], starts[rank + 1]) for rank in range(world_size)])

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.slots_per_rank))

    @property
    def world_size(self) -> int:
        return len(self.slots_per_rank)

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """The experts of one rank in slot order.

        Raises:
            SpecError: there is no such rank.
        """
        return self.slots_per_rank[integer("rank", rank, 0, self.world_size - 1)]

    def owner(self, expert: int) -> int:
        """The rank that holds an expert.

        Raises:
            SpecError: there is no such expert.
        """
        expert = integer("expert", expert, 0, self.num_experts - 1)
        return next(rank for rank, slots in enumerate(self.slots_per_rank) if expert in slots)
