"""The names flashmoe-py gives to what a layer is and what a call takes."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

from ..errors import SpecError, UnsupportedError
from ..spec import MoESpec
from ..values import INT32_MAX, integer

E = TypeVar("E", bound=IntEnum)


class Topology(IntEnum):
    """How the ranks reach each other."""

    NVLINK_ONLY = 0
    MIXED = 1


class MLPType(IntEnum):
    """What an expert computes: ``down @ (act(up @ x) * (up_v @ x))``, or without the second factor."""

    GATED = 0
    VANILLA = 1


class DataType(IntEnum):
    """Element type of tokens, weights, biases and output. ``FP32`` runs as TF32 on GPUs."""

    BF16 = 0
    FP16 = 1
    FP32 = 2
    FP64 = 3


class ActivationType(IntEnum):
    """The activation between the two products; ``GELU`` is the one with erf."""

    IDENTITY = 0
    SILU = 1
    GELU = 2
    RELU = 3


DTYPES = {
    DataType.BF16: "bfloat16", DataType.FP16: "float16", DataType.FP32: "float32", DataType.FP64: "float64",
}  # fmt: skip
# A word of MoESpec, and what it is called here.
_NAMES = {
    "hidden_size": "token_dim", "intermediate_size": "ffn_size", "max_tokens": "tokens_per_rank",
    "world_size": "ep_world", "capacity": "expert_peer_capacity",
}  # fmt: skip


@dataclass
class InitArgs:
    """What a layer is, and which rank of it this process is.

    Args:
        data_type: element type of everything but counts.
        tokens_per_rank: S, tokens of every call on every rank.
        token_dim: H.
        ffn_size: I.
        num_experts: E, over all ranks.
        top_k: k, experts of a token.
        gpu_arch: ten times the compute capability (900 for 9.0), of the GPU ``device_id``; the host target only asks that it be
            at least 700.
        mlp_type, act_type: what an expert computes.
        stream_ptr: handle of a CUDA stream, 0 for the default one; 0 for the host target.
        device_id: number of this process's GPU; without meaning for the host target.
        ep_world: ranks that share the experts. Default, with the five that follow: ``initialize`` fills them in, for all ranks
            of the job and equal blocks of experts.
        num_local_experts: experts of this rank.
        ep_rank: this rank among the ``ep_world``.
        my_pe: this rank among all ranks of the job.
        expert_map: for each expert, the ``ep_rank`` that holds it; a rank's weights are in the order of its experts.
        rank_map: for each ``ep_rank``, its number among all ranks of the job.
        expert_peer_capacity: the most tokens of one rank that an expert takes, later ones are dropped; ``None`` drops none
            (flashmoe-py would set ``ceil(S / E) * k``).
    """

    data_type: DataType
    tokens_per_rank: int
    token_dim: int
    ffn_size: int
    num_experts: int
    top_k: int
    gpu_arch: int
    mlp_type: MLPType
    act_type: ActivationType
    stream_ptr: int
    device_id: int
    _: KW_ONLY
    ep_world: int | None = None
    num_local_experts: int | None = None
    ep_rank: int | None = None
    my_pe: int | None = None
    expert_map: list[int] | None = None
    rank_map: list[int] | None = None
    expert_peer_capacity: int | None = None
    topo: Topology = field(default=Topology.MIXED, init=False)

    def spec(self, ep_world: int, **changes: Any) -> MoESpec:
        """The layer as a :class:`~flashmoe_gen.MoESpec`.

        Raises:
            SpecError: a field is not valid; names it.
        """
        integer("gpu_arch", self.gpu_arch, 700, INT32_MAX)
        try:
            return MoESpec(
                self.token_dim,
                self.ffn_size,
                self.num_experts,
                self.top_k,
                dtype=DTYPES[_member("data_type", self.data_type, DataType)],
                mlp="gated" if _member("mlp_type", self.mlp_type, MLPType) is MLPType.GATED else "vanilla",
                activation=_member("act_type", self.act_type, ActivationType).name.lower(),  # type: ignore[arg-type]
                bias=True,
                capacity=self.expert_peer_capacity,
                max_tokens=self.tokens_per_rank,
                world_size=ep_world,
                **changes,
            )
        except SpecError as error:
            text = str(error)
            for name, known in _NAMES.items():
                text = text.replace(name, known)
            raise SpecError(text) from None

    def differs(self, other: InitArgs, names: str) -> str:
        """The first of some fields in which two differ, in words; ``""`` when none does."""
        for name in names.split():
            if (mine := getattr(self, name)) != (its := getattr(other, name)):
                return f"{name}={mine!r} and {name}={its!r}"
        return ""


@dataclass
class ForwardArgs:
    """The memory of one call: addresses of contiguous arrays, as integers.

    Args:
        mt: the ``mlp_type`` the layer was initialised with.
        tokens: ``[S, H]``.
        expert_counts: int32 ``[E]``, as ``router.forward`` has filled it. It is not read: the layer counts its routes itself.
        local_expert_up: ``[num_local_experts, I, H]``: rows of H, as ``nn.Linear`` has them. Of a gated MLP the one that the
            activation is applied to, which other projects call the gate.
        local_bias_up: ``[num_local_experts, I]``.
        local_expert_down: ``[num_local_experts, H, I]``.
        local_bias_down: ``[num_local_experts, H]``.
        moe_out: ``[S, H]``, written.
        stream_ptr: the CUDA stream of the call; 0 for the host target.
        swish_alpha, swish_beta: ``up`` becomes ``swish_alpha * act(swish_beta * up)``; of a gated MLP alone. A pair that the
            layer has not seen yet compiles a kernel, in the first call that has it.
        local_expert_up_v: ``[num_local_experts, I, H]``, the other factor of a gated MLP; ``None`` or 0 for a vanilla one.
        local_bias_up_v: ``[num_local_experts, I]``, likewise.

    Raises:
        SpecError: a gated MLP without ``local_expert_up_v`` or ``local_bias_up_v``.
        UnsupportedError: a vanilla MLP with one of them, or with a ``swish_alpha`` or ``swish_beta`` that is not 1.
    """

    mt: MLPType
    tokens: int
    expert_counts: int
    local_expert_up: int
    local_bias_up: int
    local_expert_down: int
    local_bias_down: int
    moe_out: int
    stream_ptr: int
    _: KW_ONLY
    swish_alpha: float = 1.0
    swish_beta: float = 1.0
    local_expert_up_v: int | None = None
    local_bias_up_v: int | None = None

    def __post_init__(self) -> None:
        if _member("mt", self.mt, MLPType) is MLPType.GATED:
            for name in ("local_expert_up_v", "local_bias_up_v"):
                if getattr(self, name) is None:
                    raise SpecError(f"{name}=None is not valid for mt=MLPType.GATED. Must be an address.")
            return
        for name, none in (("local_expert_up_v", None), ("local_bias_up_v", None), ("swish_alpha", 1), ("swish_beta", 1)):
            if (value := getattr(self, name)) not in (none, none or 0):
                raise UnsupportedError(f"{name}={value!r} is not supported for mt=MLPType.VANILLA. Must be {none}.")


@dataclass
class RouterForwardArgs:
    """The memory of one call of the router: addresses of contiguous arrays, as integers.

    Args:
        tokens: ``[S, H]``.
        weights: ``[E, H]``: rows of H. (flashmoe-py's quickstart gives its array the shape ``[H, E]``; the memory is read as this.)
        expert_counts: int32 ``[E]``, written: this rank's routes to each expert, those over a capacity too.
        stream_ptr: the CUDA stream of the call; 0 for the host target.
        routing: not supported, as ``return_logits=True`` is not.
    """

    tokens: int
    weights: int
    expert_counts: int
    stream_ptr: int
    _: KW_ONLY
    routing: int = 0

    def __post_init__(self) -> None:
        if self.routing:
            raise UnsupportedError(f"routing={self.routing!r} is not supported: the router returns no scores. Must be 0.")


@dataclass
class RefForwardArgs:
    """The memory of one call of the reference: addresses of contiguous arrays, as integers.

    Args:
        expert_up, expert_down, bias_up, bias_down: as in :class:`ForwardArgs`, but of **all** ``num_experts``, in their order.
        ref_input, ref_interim0, ref_interim1: room for flashmoe-py's intermediate results; neither read nor written.
        ref_out: ``[S, H]``, written.
        expert_up_v, bias_up_v: of a gated MLP.
    """

    expert_up: int
    expert_down: int
    bias_up: int
    bias_down: int
    ref_input: int
    ref_interim0: int
    ref_interim1: int
    ref_out: int
    _: KW_ONLY
    expert_up_v: int
    bias_up_v: int


class ContextHandle:
    """What ``initialize`` returns: ``mod``, which does the work, and ``context``, the number it knows its memory by."""

    __slots__ = ("_ctx", "_mod")

    def __init__(self, mod: Any, ctx: Any) -> None:
        self._mod, self._ctx = mod, ctx

    @property
    def context(self) -> Any:
        return self._ctx

    @property
    def mod(self) -> Any:
        return self._mod


def _member(name: str, value: object, kind: type[E]) -> E:
    """The member of an enumeration that a value is."""
    if isinstance(value, int) and not isinstance(value, bool):
        for member in kind:
            if member == value:
                return member
    members = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
    raise SpecError(f"{name}={value!r} is not valid. Must be one of {members}.")


K = TypeVar("K")


def of_kind(handle: object, kind: type[K], made_by: str) -> K:
    """What does the work of a handle.

    Raises:
        SpecError: it is no handle, or another function's.
    """
    mod = handle.mod if isinstance(handle, ContextHandle) else None
    if not isinstance(mod, kind):
        raise SpecError(f"handle is not valid: {type(handle).__name__} is not what {made_by} returned.")
    return mod


