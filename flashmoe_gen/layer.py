"""The MoE layer as users call it: arrays in, arrays out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import arrays, comm, env
from .arch import get_arch
from .args import MOE_ARGS, STATE, TRACE_EVENT
from .errors import CommError, SpecError
from .experts import Experts
from .instrument import Instrument
from .launch.cuda import CudaTarget, device_count
from .launch.host import HostTarget
from .launch.target import Target, TensorBox
from .layout import HeapNeeds, WorkspaceLayout, return_slots
from .plan import KernelPlan, TileConfig, default_tile, plan_kernel, resolve_combine
from .render import generate
from .router import Router
from .spec import MoESpec, Placement

logger = logging.getLogger("flashmoe_gen")

_NO_CAPACITY = 2**31 - 1
_TRACE = [("party", "i4"), ("track", "i4"), ("work", "u4"), ("what", "u4", (2,)), ("start", "u8"), ("end", "u8")]


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
    prepared: tuple[Any, ...]  # what the launch passes beside them
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
        stream: CUDA stream of the calls (``target="cuda"``); default: the current one of the array library at each call.
        max_blocks: the most blocks of a launch (``target="cuda"``), of which whole clusters are used; default: all that are
            resident at the same time, shared evenly by the ranks of this process.
        instrument: tracing or random delays in the kernel, for looking into it; default none.

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
        max_blocks: int | None = None,
        instrument: Instrument | None = None,
    ) -> None:
        self.spec = spec
        self._instrument = instrument or Instrument()
        self._target = _resolve_target(target, comm, max_blocks)
        self._stream = self._target.stream(stream, None) if stream is not None else None
        self.comm = _resolve_comm(spec, comm)
        arch = self._target.arch
        self.tile = tile or default_tile(spec, arch)
        self._combine = resolve_combine(spec, self.tile, get_arch(arch))
        self._plan = plan_kernel(spec, self.tile, arch)
        compiled = generate(spec, arch=arch, tile=self.tile, instrument=instrument).compile()
        self._kernel = self._target.load(
            compiled,
            threads=self._plan.threads,
            shared_bytes=self._plan.shared_bytes,
            boxes=_tensor_boxes(spec, self.tile, self._plan),
            # The driver then starts all blocks or none. Not where ranks share a GPU: what the stream of one runs before its
            # launch, such as the clearing after reset(), may find no room beside another's cooperative launch.
            cooperative=spec.world_size == 1,
            cluster=self.tile.cluster,
        )
        self._router: Router | None = None
        self._processors = self._target.processors(self._kernel, spec.world_size)
        self._closed = False
        self.comm.reserve(self._target, HeapNeeds.of(spec, self._combine))
        self.set_placement(placement or Placement.default(spec.num_experts, spec.world_size))

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the workspace back; later calls raise :class:`CommError`. The communicator stays open."""
        if not self._closed:
            self._target.synchronize()
            self._workspace = self._target.allocate(0)
        self._closed = True

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
        position = np.empty(spec.num_experts, np.int32)
        position[order] = np.arange(spec.num_experts, dtype=np.int32)
        self._target.synchronize()  # a call in flight still uses the old tables
        self._expert_position = self._target.upload(position)
        self._owner_first = self._target.upload(np.cumsum([0, *map(len, placement.slots_per_rank)], dtype=np.int32))
        self._layout = WorkspaceLayout.of(
            spec,
            self.tile,
            self._plan,
            combine=self._combine,
            local_experts=self.local_experts,
            processors=self._processors,
            planners=self._workers - self._target.system_workers,
            tracks=self._workers * self._plan.tracks,
            trace_events=self._instrument.trace_events,
        )
        self._workspace = self._target.allocate(self._layout.bytes)
        self._reported = 0  # invalid ids
        self.comm.attach(self)
        self._args = self._constant_args()
        self._prepared: tuple[bytes, tuple[Any, ...]] = (b"", ())
        self._prepared_for: tuple[Experts | None, int] = (None, 0)

    @property
    def local_experts(self) -> int:
        """Experts this rank holds."""
        return len(self.placement.local_experts(self.comm.rank))

    @property
    def target(self) -> str:
        """``"host"`` or ``"cuda"``."""
        return self._target.name

    @property
    def _workers(self) -> int:
        return self._target.workers(self._kernel, self._processors)

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
            self._router = Router(self.spec, self._target)
        return self._router(x, router_weight, logit_bias=logit_bias, selection_bias=selection_bias, stream=self._stream)

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
        packed = self._pack(x, topk_ids, topk_weights, experts, out, num_tokens)
        chosen = self._stream if stream is None and self._stream is not None else self._target.stream(stream, x)
        self.comm.run(
            lambda: self._target.launch(self._kernel, packed.args, self._workers, chosen, packed.prepared)
        )
        return arrays.exported(packed.result, x) if out is None else out

    def _pack(
        self, x: Any, topk_ids: Any, topk_weights: Any, experts: Experts, out: Any, num_tokens: Any
    ) -> PackedCall:
        """Check the arguments of a call and pack them."""
        spec, device = self.spec, self._target.device
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype, device=device, alignment=16)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        ids = arrays.checked(topk_ids, "topk_ids", (count, spec.top_k), "int32", device=device)
        weights = arrays.checked(topk_weights, "topk_weights", (count, spec.top_k), "float32", device=device)
        if not isinstance(experts, Experts):
            raise SpecError(f"experts is a {type(experts).__name__}. Must be a flashmoe_gen.Experts.")
        limit, counter = _token_limit(num_tokens, count, device)
        if device == "cpu":
            self._check_ids(ids.numpy()[:limit])
        result = arrays.empty_like(x, tokens.shape, spec.dtype) if out is None else out
        y = arrays.checked(result, "out", tokens.shape, spec.dtype, device=device, alignment=16)
        if y.read_only:
            raise SpecError("out is read-only.")
        args, prepared = self._args_for(experts)
        for name, view in (("x", tokens), ("topk_ids", ids), ("topk_weights", weights), ("y", y)):
            args[name] = view.pointer
        args["tokens"] = limit
        args["num_tokens"] = counter
        args["timeout_ns"] = int(env.timeout_s() * 1e9)
        return PackedCall(args, prepared, result, (tokens, ids, weights, y, experts))

    def _args_for(self, experts: Experts) -> tuple[np.ndarray[Any, Any], tuple[Any, ...]]:
        """A copy of the arguments that stay the same while the weights and the heap do, and what goes with them."""
        made_for = (experts, self.comm.generation)
        if self._prepared_for != made_for:
            args = self._args.copy()
            fields = experts.arguments(self.spec, self.local_experts, self._target.device) | self.comm.heap.arguments()
            for name, value in fields.items():
                args[name] = value
            args["peers"][0, : self.spec.world_size] = self.comm.heap_pointers()
            self._prepared = args.tobytes(), self._target.prepare(self._kernel, args)
            self._prepared_for = made_for
        image, prepared = self._prepared
        return np.frombuffer(bytearray(image), MOE_ARGS.dtype), prepared  # copying a structured array takes NumPy far longer

    def stats(self) -> LayerStats:
        """Counts since the layer was made."""
        self._require_open()
        state = self._state()
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

    def take_trace(self) -> np.ndarray[Any, Any]:
        """What the calls since the last time did, after waiting for those in flight.

        Returns:
            A structured array, one event each: ``party`` (block on a GPU, thread on the host), ``track`` (warp), ``work``
            (index into :data:`flashmoe_gen.args.WORKS`), ``what`` (M-block and tile, or token), ``start`` and ``end`` in ns.

        Raises:
            SpecError: the layer keeps no trace, or had no room for all events.
        """
        self._require_open()
        room, tracks = self._instrument.trace_events, self._plan.tracks
        if not room:
            raise SpecError("The layer keeps no trace. Make it with instrument=Instrument(trace_events=...).")
        kept, counted = (self._layout.regions[name] for name in ("trace", "trace_counts"))
        counts = self._workspace.read(counted.offset, counted.bytes).view(np.uint32)
        events = self._workspace.read(kept.offset, kept.bytes).view(TRACE_EVENT.dtype).reshape(len(counts), room)
        self._workspace.fill(counted.offset, counted.bytes, 0)
        if counts.max() > room:
            raise SpecError(f"trace_events={room} is not valid. These calls need {counts.max()}.")
        held = np.arange(room) < counts[:, None]
        trace = np.empty(int(counts.sum()), _TRACE)
        trace["party"], trace["track"] = np.divmod(np.nonzero(held)[0], tracks)
        for name in ("work", "what", "start", "end"):
            trace[name] = events[name][held]
        return trace

    def check(self) -> None:
        """Wait for the calls in flight and raise what any of them left behind.

        Raises:
            KernelTimeoutError, CommError: as :meth:`flashmoe_gen.comm.Communicator.check`.
            SpecError: ids at or over ``num_experts`` in a call on a GPU, where they are not checked in advance; such routes
                were left out.
        """
        self._require_open()
        state = self._state()
        self.comm.check()
        if invalid := int(state["invalid"]) - self._reported:
            self._reported += invalid
            raise SpecError(f"topk_ids held {invalid} ids that are not below num_experts={self.spec.num_experts}.")

    def _require_open(self) -> None:
        if self._closed:
            raise CommError("The layer is closed.")

    def _state(self) -> Any:
        region = self._layout.regions["state"]
        return self._workspace.read(region.offset, region.bytes).view(STATE.dtype)[0]

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
        spec, base = self.spec, self._workspace.pointer
        args = MOE_ARGS.zeros()
        for name in self._layout.regions:
            args[name] = base + self._layout.regions[name].offset
        for name, value in self._layout.sizes.items():
            args[name] = value
        args["expert_position"] = self._expert_position.pointer
        args["owner_first"] = self._owner_first.pointer
        args["record"] = self.comm.record.ctypes.data
        args["delay_ns"] = self._instrument.delay_ns
        args["max_tokens"] = spec.max_tokens
        args["num_experts"] = spec.num_experts
        args["local_experts"] = self.local_experts
        args["capacity"] = _NO_CAPACITY if spec.capacity is None else spec.capacity
        args["rank"] = self.comm.rank
        args["world_size"] = spec.world_size
        args["combine_by_rank"] = self._combine == "rank"
        args["return_slots"] = return_slots(spec, self._combine)
        return args

    def restart(self) -> None:
        """Start from clean counters: for the communicator, which has cleared the signals that they go with."""
        if not self._closed:
            for region in self._layout.regions.values():
                if region.persistent:
                    self._workspace.fill(region.offset, region.bytes, 0)
            self._reported = 0


def _resolve_target(target: str | None, communicator: comm.Communicator | None, max_blocks: int | None) -> Target:
    chosen = target or env.target() or (communicator.target if communicator is not None else None)
    if chosen is None:
        chosen = "cuda" if device_count() > 0 else "host"
    if chosen == "cuda":
        return CudaTarget(max_blocks)
    if chosen != "host":
        raise SpecError(f"target={target!r} is not valid. Must be 'host' or 'cuda'.")
    if max_blocks is not None:
        raise SpecError("max_blocks= is not valid for target='host'.")
    return HostTarget()


def _tensor_boxes(spec: MoESpec, tile: TileConfig, plan: KernelPlan) -> tuple[TensorBox, ...]:
    """The tensor maps of gate, up, down and ring that the kernel takes, in this order; none when it loads without them."""
    inner, outer = plan.tensor_boxes
    if not inner:
        return ()
    hidden, middle, size = spec.hidden_size, spec.intermediate_size, spec.element.size
    gate = "gate" if spec.mlp == "gated" else "up"  # a vanilla MLP has no gate: its kernel never loads through that map
    return (
        *(TensorBox(name, "local_experts", middle, hidden, inner, tile.block_k, size) for name in (gate, "up")),
        TensorBox("down", "local_experts", hidden, middle, outer, tile.block_k, size),
        TensorBox("ring", "ring_slots", tile.block_m, middle, plan.ring_box, tile.block_k, size),
    )


def _resolve_comm(spec: MoESpec, communicator: comm.Communicator | None) -> comm.Communicator:
    if communicator is None:
        if spec.world_size != 1:
            raise CommError(f"world_size={spec.world_size} needs comm=: one of comm.local_group({spec.world_size}).")
        return comm.init("single")
    if communicator.world_size != spec.world_size:
        raise CommError(f"comm has world_size={communicator.world_size}, but the spec says {spec.world_size}.")
    return communicator


def _token_limit(num_tokens: Any, count: int, device: str) -> tuple[int, int]:
    """Tokens of the call, and the address of their number when only the GPU knows it (0: it does not)."""
    if num_tokens is None:
        return count, 0
    if isinstance(num_tokens, int):
        limit = num_tokens
    else:
        found = arrays.checked(num_tokens, "num_tokens", (1,), "int32", device=device)
        if device != "cpu":
            return count, found.pointer
        limit = int(found.numpy()[0])
    if not 0 <= limit <= count:
        raise SpecError(f"num_tokens={limit} is not valid. Must be between 0 and the {count} tokens of x.")
    return limit, 0
