"""The MoE layer as users call it: arrays in, arrays out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import arrays, comm, env
from .args import MOE_ARGS, STATE
from .arch import get_arch
from .errors import CommError, SpecError, UnsupportedError
from .experts import Experts
from .launch.host import SCHEDULER_THREADS, HostKernel, default_processors
from .layout import HeapNeeds, WorkspaceLayout, return_slots
from .plan import TileConfig, default_tile, plan_kernel, resolve_combine
from .render import generate
from .router import Router
from .spec import MoESpec, Placement

logger = logging.getLogger("flashmoe_gen")

_NO_CAPACITY = 2**31 - 1


@dataclass(frozen=True)
class LayerStats:
    """What a layer has done on this rank since it was made.

    Attributes:
        calls: finished calls.
        routes: routes sent to experts (on any rank) by this rank's tokens.
        masked: routes with a negative id.
        dropped: routes over the capacity.
        rows: expert rows computed here, for all ranks' tokens.
        blocks: M-blocks computed here.
        padding: rows by which those M-blocks are larger than ``rows``.
    """

    calls: int
    routes: int
    masked: int
    dropped: int
    rows: int
    blocks: int
    padding: int


@dataclass(frozen=True)
class PackedCall:
    """The arguments of one call, the array it writes, and what must stay alive meanwhile."""

    args: np.ndarray[Any, Any]
    result: Any
    keep: tuple[Any, ...]


class MoELayer:
    """One rank's fused MoE layer: generates and compiles its kernels when made, then runs without allocating.

    Args:
        spec: what to compute.
        target: ``"host"`` or ``"cuda"``; default: ``FLASHMOE_TARGET``, else the communicator's, else ``"cuda"`` when a GPU is
            there and ``"host"`` when none is.
        tile: tile configuration; default :func:`flashmoe_gen.default_tile`.
        comm: this rank's communicator; not needed for ``world_size=1``.
        placement: which rank holds which expert; default :meth:`Placement.default`.
        stream: CUDA stream of the calls (``target="cuda"``).

    Making a layer is collective: every rank makes the same layers in the same order, before the first call.

    Raises:
        SpecError, UnsupportedError: an argument is not valid, or the target is not usable here.
        CompileError, CacheError: the kernel cannot be built.
        CommError: the communicator does not fit the spec.
    """

    def __init__(
        self,
        spec: MoESpec,
        *,
        target: Literal["host", "cuda"] | None = None,
        tile: TileConfig | None = None,
        comm: comm.Communicator | None = None,
        placement: Placement | None = None,
        stream: Any = None,
    ) -> None:
        self.spec = spec
        self.target = _resolve_target(target, comm)
        if stream is not None:
            raise SpecError("stream= is not valid for target='host'.")
        self.comm = _resolve_comm(spec, comm)
        self.tile = tile or default_tile(spec, "host")
        self._combine = resolve_combine(spec, self.tile, get_arch("host"))
        self._plan = plan_kernel(spec, self.tile, "host")
        self._kernel = HostKernel.load(generate(spec, arch="host", tile=self.tile).compile())
        self._router: Router | None = None
        self._processors = default_processors(spec.world_size)
        self._closed = False
        self.comm.reserve(HeapNeeds.of(spec, self._combine))
        self.set_placement(placement or Placement.default(spec.num_experts, spec.world_size))

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the workspace back; later calls raise :class:`CommError`. The communicator stays open."""
        self._closed = True
        self._workspace = np.empty(0, np.uint8)

    def set_placement(self, placement: Placement) -> None:
        """Collective: use another placement from the next call on (which then takes experts in its slot order).

        Raises:
            SpecError: it does not fit the spec.
        """
        spec = self.spec
        if placement.world_size != spec.world_size or placement.num_experts != spec.num_experts:
            raise SpecError(
                f"placement has {placement.num_experts} experts on {placement.world_size} ranks. "
                f"Must be {spec.num_experts} on {spec.world_size}."
            )
        self.placement = placement
        order = [expert for rank in placement.slots_per_rank for expert in rank]
        self._expert_position = np.empty(spec.num_experts, np.int32)
        self._expert_position[order] = np.arange(spec.num_experts, dtype=np.int32)
        self._owner_first = np.cumsum([0, *map(len, placement.slots_per_rank)], dtype=np.int32)
        self._layout = WorkspaceLayout.of(
            spec,
            self.tile,
            self._plan,
            combine=self._combine,
            local_experts=self.local_experts,
            processors=self._processors,
        )
        self._workspace = comm.aligned_bytes(self._layout.bytes)
        self._generation = self.comm.generation
        self._args = self._constant_args()

    @property
    def local_experts(self) -> int:
        """Experts this rank holds."""
        return len(self.placement.local_experts(self.comm.rank))

    @property
    def _threads(self) -> int:
        return self._processors + SCHEDULER_THREADS

    @property
    def workspace_bytes(self) -> int:
        """Bytes this layer holds on this rank, beside the communicator's symmetric heap (``layer.comm.heap.bytes``)."""
        return self._layout.bytes

    def route(
        self, x: Any, router_weight: Any, *, logit_bias: Any = None, selection_bias: Any = None
    ) -> tuple[Any, Any]:
        """Choose the experts of each token.

        Args:
            x: tokens ``[T, H]`` of the spec's dtype.
            router_weight: ``[E, H]`` of the spec's dtype.
            logit_bias: float32 ``[E]`` added to the logits (gpt-oss), or ``None``.
            selection_bias: float32 ``[E]`` added to the scores for the choice alone (DeepSeek-V3), or ``None``.

        Returns:
            ``(topk_ids int32 [T, k], topk_weights float32 [T, k])``, arrays of the kind of ``x``, by descending score.

        Raises:
            SpecError: wrong shape, dtype or strides. Also what :class:`MoELayer` raises when it builds a kernel.
        """
        self._require_open()
        if self._router is None:
            self._router = Router(self.spec, processors=self._processors)
        return self._router(x, router_weight, logit_bias=logit_bias, selection_bias=selection_bias)

    def __call__(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        experts: Experts,
        *,
        out: Any = None,
        num_tokens: Any = None,
        stream: Any = None,
    ) -> Any:
        """Run the layer. With several ranks it is collective: every rank calls it, with any number of tokens.

        Args:
            x: this rank's tokens ``[T, H]``, ``T <= max_tokens``, zero included.
            topk_ids: int32 ``[T, k]``, global expert ids; negative ids are masked routes.
            topk_weights: float32 ``[T, k]``.
            experts: this rank's weights.
            out: where to write y; nothing is allocated then.
            num_tokens: int32 ``[1]`` (or an int): only that many leading tokens count; the other rows of y stay as they are.
            stream: not for the host target.

        Returns:
            y ``[T, H]``: ``out``, or a new array of the kind of ``x``. NaN when a wait passed its deadline; the next call,
            :meth:`check` and ``comm.check()`` then raise.

        Raises:
            SpecError: wrong shape, dtype, strides, id out of range, too many tokens.
            KernelTimeoutError, CommError: an earlier call failed, or the communicator is closed.
        """
        self._require_open()
        if stream is not None:
            raise SpecError("stream= is not valid for target='host'.")
        packed = self._pack(x, topk_ids, topk_weights, experts, out, num_tokens)
        self.comm.run(lambda: self._kernel.launch(self._bind(packed), self._threads))
        return arrays.exported(packed.result, x) if out is None else out

    def _pack(
        self, x: Any, topk_ids: Any, topk_weights: Any, experts: Experts, out: Any, num_tokens: Any
    ) -> PackedCall:
        """Check the arguments of a call and pack them."""
        spec = self.spec
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        ids = arrays.checked(topk_ids, "topk_ids", (count, spec.top_k), "int32")
        weights = arrays.checked(topk_weights, "topk_weights", (count, spec.top_k), "float32")
        limit = _token_limit(num_tokens, count)
        self._check_ids(ids.numpy()[:limit])
        if not isinstance(experts, Experts):
            raise SpecError(f"experts is a {type(experts).__name__}. Must be a flashmoe_gen.Experts.")
        result = arrays.empty_like(x, tokens.shape, spec.dtype) if out is None else out
        y = arrays.checked(result, "out", tokens.shape, spec.dtype)
        if y.read_only:
            raise SpecError("out is read-only.")
        args = self._args.copy()
        for name, value in experts.arguments(spec, self.local_experts).items():
            args[name] = value
        for name, view in (("x", tokens), ("topk_ids", ids), ("topk_weights", weights), ("y", y)):
            args[name] = view.pointer
        args["tokens"] = limit
        return PackedCall(args, result, (tokens, ids, weights, y, experts))

    def stats(self) -> LayerStats:
        """Counts since the layer was made."""
        self._require_open()
        state = self._region("state").view(STATE.dtype)[0]
        rows, blocks = int(state["rows"]), int(state["blocks"])
        return LayerStats(
            calls=int(state["calls"]),
            routes=int(state["routes"]),
            masked=int(state["masked"]),
            dropped=int(state["dropped"]),
            rows=rows,
            blocks=blocks,
            padding=blocks * self.tile.block_m - rows,
        )

    def check(self) -> None:
        """Raise what an earlier call left behind; see :meth:`flashmoe_gen.comm.Communicator.check`."""
        self._require_open()
        self.comm.check()

    def _require_open(self) -> None:
        if self._closed:
            raise CommError("The layer is closed.")

    def _region(self, name: str) -> np.ndarray[Any, Any]:
        region = self._layout.regions[name]
        return self._workspace[region.offset : region.offset + region.bytes]

    def _check_ids(self, ids: np.ndarray[Any, Any]) -> None:
        experts = self.spec.num_experts
        if ids.size and ids.max() >= experts:
            token, route = map(int, np.argwhere(ids >= experts)[0])
            raise SpecError(
                f"topk_ids[{token}, {route}]={ids[token, route]} is not valid. Must be below num_experts={experts} "
                "(negative ids are masked routes)."
            )

    def _constant_args(self) -> np.ndarray[Any, Any]:
        """The fields that do not change from call to call."""
        spec, base = self.spec, self._workspace.ctypes.data
        args = MOE_ARGS.zeros()
        for name in self._layout.regions:
            args[name] = base + self._layout.regions[name].offset
        for name, value in self._layout.sizes.items():
            args[name] = value
        args["expert_position"] = self._expert_position.ctypes.data
        args["owner_first"] = self._owner_first.ctypes.data
        args["record"] = self.comm.record.ctypes.data
        args["max_tokens"] = spec.max_tokens
        args["num_experts"] = spec.num_experts
        args["local_experts"] = self.local_experts
        args["capacity"] = _NO_CAPACITY if spec.capacity is None else spec.capacity
        args["rank"] = self.comm.rank
        args["world_size"] = spec.world_size
        args["combine_by_rank"] = self._combine == "rank"
        args["return_slots"] = return_slots(spec, self._combine)
        return args

    def _bind(self, packed: PackedCall) -> np.ndarray[Any, Any]:
        """Fill in where the heap lies now; start from clean counters when its signals did."""
        args = packed.args
        if self._generation != self.comm.generation:
            self._generation = self.comm.generation
            for name in ("counter_sets", "appended"):
                self._region(name)[:] = 0
            self._region("state").view(STATE.dtype)["calls"] = 0
        for name, value in self.comm.heap.arguments().items():
            args[name] = value
        args["peers"][0, : self.spec.world_size] = self.comm.heap_pointers()
        args["timeout_ns"] = int(env.timeout_s() * 1e9)
        return args


def _resolve_target(target: str | None, communicator: comm.Communicator | None) -> str:
    chosen = target or env.target() or (communicator.target if communicator is not None else None)
    if chosen is None:
        from .launch.cuda import device_count

        chosen = "cuda" if device_count() > 0 else "host"
    if chosen not in ("host", "cuda"):
        raise SpecError(f"target={target!r} is not valid. Must be 'host' or 'cuda'.")
    if chosen == "cuda":
        from .launch.cuda import require_device

        require_device()
        raise UnsupportedError(
            "target='cuda' is not supported by this version: it generates and compiles GPU kernels, "
            "but launches the host target alone. Pass target='host'."
        )
    return chosen


def _resolve_comm(spec: MoESpec, communicator: comm.Communicator | None) -> comm.Communicator:
    if communicator is None:
        if spec.world_size != 1:
            raise CommError(f"world_size={spec.world_size} needs comm=: one of comm.local_group({spec.world_size}).")
        return comm.init("single")
    if communicator.world_size != spec.world_size:
        raise CommError(f"comm has world_size={communicator.world_size}, but the spec says {spec.world_size}.")
    return communicator


def _token_limit(num_tokens: Any, count: int) -> int:
    if num_tokens is None:
        return count
    if isinstance(num_tokens, int):
        limit = num_tokens
    else:
        limit = int(arrays.checked(num_tokens, "num_tokens", (1,), "int32").numpy()[0])
    if not 0 <= limit <= count:
        raise SpecError(f"num_tokens={limit} is not valid. Must be between 0 and the {count} tokens of x.")
    return limit
