"""The MoE layer as users call it: arrays in, arrays out."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
from typing import Any, Literal, NoReturn

import numpy as np

from . import arrays, comm, env
from .call import PackedCall
from .comm.alone import alone
from .comm.base import MovedError
from .comm.communicator import Agree
from .counters import LayerStats
from .errors import CommError, SpecError, UnsupportedError
from .experts import Experts
from .fused import Fused
from .instrument import Instrument
from .launch import choose
from .layout import HeapNeeds
from .placed import Placed, require_fitting
from .programs import default_tile
from .router import Router
from .spec import MoESpec, Placement
from .tile import Schedule, TileConfig, resolve_schedule


class MoELayer:
    """One rank's fused MoE layer: generates and compiles its kernels when made, then runs without allocating.

    Args:
        spec: what to compute.
        target: ``"host"`` or ``"cuda"``; default: ``FLASHMOE_TARGET``, else the communicator's, else ``"cuda"`` when a GPU is
            there and ``"host"`` when none is.
        tile: tile configuration; default :func:`flashmoe_gen.default_tile`.
        schedule: order of the tasks, and how rows come back; default: what :class:`Schedule` picks.
        comm: this rank's communicator. Not needed for ``world_size=1``: such layers share one with those of the same device whose
            heap they fit: their calls follow each other, a failure or ``layer.comm.close()`` is that of all of them, and
            ``comm.init("single")`` gives a layer one of its own.
        placement: which rank holds which expert; default :meth:`Placement.default`.
        stream: CUDA stream of the calls (``target="cuda"``); default: the current one of the array library at each call.
        max_blocks: the most blocks of a launch (``target="cuda"``), of which whole clusters are used; default: all that are
            resident at the same time, shared evenly by the ranks on the GPU.
        reserve_multiprocessors: multiprocessors that launches leave free (``target="cuda"``) for kernels that must run at the same
            time on other streams, such as a collective of NCCL that a peer waits for. Each of the others then gets one block.
        instrument: tracing or random delays in the kernel, for looking into it; default none.

    Making a layer is collective: every rank makes the same layers in the same order. Processes wait for each other there, and all
    raise when one cannot make it or makes another; in one process the first call waits until all ranks have made it.

    A layer may be used from several threads, and be closed by any: with one rank, calls wait for each other (on a GPU they
    follow each other there, whatever their streams are); with several ranks a call while another thread's call is in flight
    raises :class:`CommError`, since their order must be the same on all ranks. A rank whose call raises tells its peers, which
    raise a :class:`CommError` with its reason instead of waiting for it.

    ``copy.deepcopy`` of a layer makes another one on the same communicator; a layer cannot be pickled.

    Raises:
        SpecError, UnsupportedError: an argument is not valid, or the target is not usable here.
        CompileError, CacheError: the kernel cannot be built.
        CommError: the communicator does not fit the spec.
    """

    _placed: Placed

    def __init__(
        self,
        spec: MoESpec,
        *,
        target: Literal["host", "cuda"] | None = None,
        tile: TileConfig | None = None,
        schedule: Schedule | None = None,
        comm: comm.Communicator | None = None,
        placement: Placement | None = None,
        stream: Any = None,
        max_blocks: int | None = None,
        reserve_multiprocessors: int = 0,
        instrument: Instrument | None = None,
    ) -> None:
        self.spec = spec
        self._max_blocks, self._reserve_multiprocessors = max_blocks, reserve_multiprocessors
        self._given_stream, self._given_schedule = stream, schedule
        self.comm = comm if comm is not None else _own_comm(spec, target, max_blocks)
        with self.comm.agreeing("layer {n}") as agree:
            self._make(agree, target, tile, schedule, placement, stream, instrument)

    def _make(
        self,
        agree: Agree,
        target: str | None,
        tile: TileConfig | None,
        schedule: Schedule | None,
        placement: Placement | None,
        stream: Any,
        instrument: Instrument | None,
    ) -> None:
        spec = self.spec
        if self.comm.world_size != spec.world_size:
            raise CommError(f"comm has world_size={self.comm.world_size}, but the spec says {spec.world_size}.")
        env.timeout_s()  # a bad one is found before anything is compiled
        self._instrument = instrument
        self._target = choose(
            target,
            self.comm.target,
            self._max_blocks,
            self.comm.sharing,
            device=self.comm.device,
            reserve_multiprocessors=self._reserve_multiprocessors,
        )
        self._stream = self._target.stream(stream, None) if stream is not None else None
        self.tile = tile or default_tile(spec, self._target.arch)
        self.schedule = resolve_schedule(self.tile, schedule)
        self._fused = Fused.load(spec, self.tile, self.schedule, instrument, self._target)
        self._router: Router | None = None
        self._closed = self._released = False
        placement = placement or Placement.default(spec.num_experts, spec.world_size)
        require_fitting(spec, placement)
        self.comm.bind(self._target)
        alike = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        self._number = agree(alike | {"placement": placement.slots_per_rank}, self._fused.heap_needs)
        self._place(placement)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        where = f"target={self.target!r}, rank={self.comm.rank}, workspace_bytes={self.workspace_bytes}"
        return f"MoELayer({self.spec}, {where}{state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        if self._closed:
            with self.comm.agreeing("layer {n}"):
                self._require_open()
        with self._target.current():
            made = MoELayer(
                self.spec,
                target=self._target.name,
                tile=self.tile,
                schedule=self._given_schedule,
                comm=self.comm,
                placement=self.placement,
                stream=self._given_stream,
                max_blocks=self._max_blocks,
                reserve_multiprocessors=self._reserve_multiprocessors,
                instrument=self._instrument,
            )
        memo[id(self)] = made
        return made

    def __copy__(self) -> MoELayer:
        return copy.deepcopy(self)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "A MoELayer cannot be pickled: it is bound to a device and a communicator. Keep its spec and make it again."
        )

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the workspace and everything borrowed; later calls raise :class:`CommError`. The communicator stays open.

        Waits for the calls in flight, those of other threads too.
        """
        with self.comm.lock:
            if self._released:
                return
            self.comm.require_outside("close()")
            self._closed = True
            self.comm.leave(self._number, f"its layer {self._number}")
            self._target.synchronize()
            self._placed = self._placed.emptied()
            self._target.forget()
            router, self._router = self._router, None
            self._released = True  # last: who is interrupted closes again
        if router is not None:
            router.close()

    def set_placement(self, placement: Placement) -> None:
        """Collective: use another placement from the next call on (which then takes experts in its slot order).

        Waits for the calls in flight, those of other threads too.

        Raises:
            SpecError: it does not fit the spec.
            CommError: the layer is closed.
        """
        with self.comm.lock:
            with self.comm.telling():
                self._require_open()
                self.comm.require_outside("set_placement()")
            with self.comm.agreeing(f"placement {{n}} of layer {self._number}") as agree:
                require_fitting(self.spec, placement)
                agree({"placement": placement.slots_per_rank})
                self._place(placement)

    def _place(self, placement: Placement) -> None:
        # An error or an interrupt before the assignment leaves the layer as it was.
        self._placed = Placed.of(self._fused, self.comm, placement, self._number)
        self.comm.attach(self)

    @property
    def placement(self) -> Placement:
        """Which rank holds which expert."""
        return self._placed.placement

    @property
    def local_experts(self) -> int:
        """Experts this rank holds."""
        return self._placed.local_experts

    @property
    def target(self) -> str:
        """``"host"`` or ``"cuda"``."""
        return self._target.name

    @property
    def workspace_bytes(self) -> int:
        """Bytes this layer alone holds on this rank; what the communicator's layers share is ``layer.comm.heap.bytes`` of symmetric
        heap and ``layer.comm.scratches.bytes`` beside it."""
        return self._placed.memory.nbytes + sum(table.nbytes for table in self._placed.tables.values())

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
        with self.comm.telling():
            with self.comm.lock:
                self._require_open()
                if self._router is None:
                    self._router = Router(self.spec, self._target, self.comm)
                router = self._router
            return router(x, router_weight, logit_bias=logit_bias, selection_bias=selection_bias, stream=self._stream)

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
            topk_ids: int32 ``[T, k]``, global expert ids; negative ids are masked routes. int64 as a torch tensor, as
                ``torch.topk`` gives them: narrowed into memory of the layer first.
            topk_weights: float32 ``[T, k]``.
            experts: this rank's weights.
            out: where to write y; nothing is allocated then. Must be writable: no JAX array, nothing that DLPack calls read-only.
            num_tokens: int32 ``[1]`` (or an int): only that many leading tokens count; the other rows of y stay as they are.
            stream: not for the host target.

        Returns:
            y ``[T, H]``: ``out``, or a new array of the kind of ``x``. On a GPU, where a call returns before it has run: NaN
            when it failed; the next call, :meth:`check` and ``comm.check()`` then raise.

        Raises:
            SpecError: wrong shape, dtype, byte order, strides, id out of range, too many tokens, no memory, ``out`` read-only.
            UnsupportedError: a tensor that requires gradients while grad mode is on.
            KernelTimeoutError, CommError: this call (host) or an earlier one failed, here or on another rank; the layer or the
                communicator is closed; several ranks, and another thread is calling.
        """
        packed = self.comm.call(
            self._number, lambda: self._call(x, topk_ids, topk_weights, experts, out, num_tokens, stream)
        )
        return arrays.exported(packed.result, x) if out is None else out

    def _call(
        self, x: Any, topk_ids: Any, topk_weights: Any, experts: Experts, out: Any, num_tokens: Any, stream: Any
    ) -> PackedCall:
        self._require_open()
        target, placed = self._target, self._placed
        chosen = self._stream if stream is None and self._stream is not None else target.stream(stream, x)
        ordering = functools.partial(target.dlpack_stream, chosen)
        while True:
            packed = placed.pack(x, topk_ids, topk_weights, experts, out, num_tokens, ordering)
            launch = functools.partial(self._launch, packed, chosen)
            try:
                self.comm.run(target, chosen, self._number, packed.generation, launch)
            except MovedError:  # another thread has made a larger layer
                continue
            if packed.lent:
                target.keep(chosen, packed.views)
                placed.pack.forget()
            return packed

    def _launch(self, packed: PackedCall, stream: Any, stop: ctypes.c_uint32 | None) -> None:
        if (ids := packed.wide_ids) is not None:
            count = ids.shape[0] * ids.shape[1]
            self._target.narrow_ids(ids.pointer, count, self._placed.pack.narrow_ids, self.spec.num_experts, stream)
        self._target.launch(self._fused.kernel, packed.prepared, self._fused.workers, stream, stop)

    def stats(self) -> LayerStats:
        """Counts since the layer was made."""
        with self.comm.lock:
            self._require_open()
            return self._placed.stats()

    def take_trace(self) -> np.ndarray[Any, Any]:
        """What the calls since the last time did, after waiting for those in flight.

        Returns:
            A structured array, one event each: ``party`` (block on a GPU, thread on the host), ``track`` (warp), ``work``
            (index into :data:`flashmoe_gen.args.WORKS`), ``what`` (M-block and tile, or token), ``start`` and ``end`` in ns.

        Raises:
            SpecError: the layer keeps no trace, or had no room for all events.
        """
        with self.comm.lock:
            self._require_open()
            return self._placed.take_trace()

    def check(self) -> None:
        """Wait for the calls in flight and raise what any of them left behind.

        Raises:
            KernelTimeoutError, CommError: as :meth:`flashmoe_gen.comm.Communicator.check`.
            SpecError: ids at or over ``num_experts`` in a call on a GPU, where they are not checked in advance; such routes
                were left out.
        """
        with self.comm.lock:
            self._require_open()
            placed, state = self._placed, self._placed.state()
        self.comm.check()
        if invalid := placed.new_invalid(state):
            raise SpecError(f"topk_ids held {invalid} ids that are not below num_experts={self.spec.num_experts}.")

    def _require_open(self) -> None:
        if self._closed:
            raise CommError("The layer is closed.")

    def restart(self) -> None:
        """Start from clean counters: for the communicator, which has cleared the signals that they go with."""
        if not self._closed:
            self._placed.restart()

def _own_comm(spec: MoESpec, target: str | None, max_blocks: int | None) -> comm.Communicator:
    if spec.world_size != 1:
        raise CommError(f"world_size={spec.world_size} needs comm=: one of comm.local_group({spec.world_size}), or comm.init().")
    return alone(choose(target, None, max_blocks), HeapNeeds.of(spec))
