"""Ranks that work together: who they are, the symmetric heap they share, and what happens when one of them fails."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from . import env
from .args import ABORT_RECORD, AWAITS, ROLES
from .errors import CommError, KernelTimeoutError, SpecError, UnsupportedError
from .launch.target import Memory, Target
from .layout import HeapLayout, HeapNeeds
from .spec import MAX_WORLD_SIZE


class _Restarts(Protocol):
    """What a communicator asks of a layer."""

    def restart(self) -> None:
        """Clear all counters."""


class _Group:
    """What the in-process ranks of one communicator share. The first layer binds it to a target and makes the heaps."""

    def __init__(self, world_size: int, heap_bytes: int | None) -> None:
        self.world_size = world_size
        self.heap_bytes = heap_bytes
        self.lock = threading.Lock()
        self.gate = threading.Barrier(world_size)
        self.running = 0  # launches in flight
        self.generation = 0  # counts resets and re-layouts of the heaps
        self.closed = False
        self.target: Target | None = None
        self.records = [ABORT_RECORD.zeros() for _ in range(world_size)]
        self.needs = HeapNeeds()
        self.layout = HeapLayout.of(self.needs, world_size)
        self.heaps: list[Memory] = []
        self.exchange: dict[int, Any] = {}
        self.layers: weakref.WeakSet[_Restarts] = weakref.WeakSet()

    def bind(self, target: Target) -> None:
        if self.target is None:
            self.target = target
            self.records = [target.record(record) for record in self.records]
        elif (self.target.name, self.target.device) != (target.name, target.device):
            raise CommError(f"The communicator's layers run on {self.target.device}; this one would run on {target.device}.")

    def carve(self, target: Target, needs: HeapNeeds) -> None:
        layout = HeapLayout.of(needs, self.world_size)
        if self.heap_bytes is not None and layout.bytes > self.heap_bytes:
            raise CommError(
                f"heap_bytes={self.heap_bytes} is too small: the layers of this communicator need {layout.bytes} bytes per rank."
            )
        target.synchronize()
        self.heaps, self.layout, self.needs = [target.allocate(layout.bytes) for _ in range(self.world_size)], layout, needs
        self.restarted()

    def clear(self) -> None:
        if self.target is not None:
            self.target.synchronize()
        for heap in self.heaps:
            for region in self.layout.regions.values():
                if region.persistent:
                    heap.fill(region.offset, region.bytes, 0)
        for record in self.records:
            record[:] = 0
        self.restarted()

    def restarted(self) -> None:
        """Signals and epochs start from zero: so do the counters of every layer, now and not in the order of some stream."""
        self.generation += 1
        for layer in self.layers:
            layer.restart()

    def wait(self, what: str) -> None:
        timeout = env.timeout_s() or None
        try:
            self.gate.wait(timeout)
        except threading.BrokenBarrierError:
            with self.lock:
                if self.gate.broken:
                    self.gate.reset()
            raise CommError(f"{what}: not all {self.world_size} ranks came within {timeout} s.") from None


class Communicator:
    """One rank's end of a group of ranks. Made by :func:`init` or :func:`local_group`, used from one thread at a time.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
    """

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size
        self.local_rank = rank

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, world_size={self.world_size})"

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def barrier(self) -> None:
        """Wait until every rank is here (at most ``FLASHMOE_TIMEOUT_S``).

        Raises:
            CommError: closed, or a rank did not come.
        """
        self._require_open()
        self._group.wait("barrier()")

    def split(self, color: int, key: int | None = None) -> Communicator:
        """Collective: a new communicator of the ranks that passed the same ``color``, ordered by ``key`` (default: rank).

        It has a heap of its own. Raises :class:`CommError` when a rank does not take part.
        """
        self._require_open()
        group = self._group
        group.exchange[self.rank] = (color, self.rank if key is None else key)
        group.wait("split()")
        votes = dict(group.exchange)
        members = sorted((vote[1], rank) for rank, vote in votes.items() if vote[0] == color)
        ranks = [rank for _, rank in members]
        group.wait("split()")
        if self.rank == ranks[0]:
            group.exchange[-1 - color] = _Group(len(ranks), group.heap_bytes)
        group.wait("split()")
        shared = group.exchange[-1 - color]
        group.wait("split()")
        group.exchange.pop(-1 - color, None)
        return Communicator(shared, ranks.index(self.rank))

    def check(self) -> None:
        """Raise what a past call of any rank left behind; return if all is well.

        Raises:
            KernelTimeoutError: a wait of this rank passed its deadline.
            CommError: closed, or another rank failed.
        """
        self._require_open()
        record = self._group.records[self.rank][0]
        if record["filled"]:
            raise KernelTimeoutError(
                rank=int(record["rank"]),
                block=int(record["block"]),
                role=ROLES[record["role"]],
                waiting_for=AWAITS[record["what"]].format(detail=int(record["detail"])),
                expected=int(record["expected"]),
                seen=int(record["seen"]),
            )
        for rank, other in enumerate(self._group.records):
            if other[0]["filled"]:
                what = f"a wait of rank {rank} passed its deadline"
                raise CommError(f"The communicator has failed: {what}. Call reset() on every rank.")

    def reset(self) -> None:
        """Collective: forget a failure and start afresh; every rank calls it, no call may be in flight.

        Raises:
            CommError: closed, a call is in flight, or a rank did not come.
        """
        self._require_open()
        group = self._group
        group.wait("reset()")
        if self.rank == 0:
            with group.lock:
                if group.running == 0:
                    group.clear()
        group.wait("reset()")
        if group.running or any(record[0]["filled"] for record in group.records):
            raise CommError("reset() while a call is in flight on some rank.")

    def close(self, *, abort: bool = False) -> None:
        """Give the communicator up; every later use raises. ``abort=True`` is for failed ones: it waits for nobody."""
        self._group.closed = True
        self._group.gate.abort()

    # What layers use -------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Changes whenever signals and epochs start from zero, maybe in other memory."""
        return self._group.generation

    @property
    def heap(self) -> HeapLayout:
        """Layout of the symmetric heap."""
        return self._group.layout

    @property
    def target(self) -> str | None:
        """Where its layers run, ``"host"`` or ``"cuda"``; ``None`` before the first one."""
        return self._group.target.name if self._group.target is not None else None

    def heap_memory(self, rank: int) -> Memory:
        """The heap of one rank."""
        return self._group.heaps[rank]

    def heap_pointers(self) -> list[int]:
        """Where each rank's heap starts, in this process."""
        return [heap.pointer for heap in self._group.heaps]

    def attach(self, layer: _Restarts) -> None:
        """From now on, and as long as it lives, a layer's counters start from zero whenever the signals do."""
        with self._group.lock:
            self._group.layers.add(layer)

    @property
    def record(self) -> np.ndarray[Any, Any]:
        """The abort record kernels of this rank fill."""
        return self._group.records[self.rank]

    def reserve(self, target: Target, needs: HeapNeeds) -> None:
        """Make the heap large enough for one more layer.

        Raises:
            CommError: closed, over ``heap_bytes``, bound to another target, or a call is in flight while the heap has to grow.
        """
        self._require_open()
        group = self._group
        with group.lock:
            group.bind(target)
            union = group.needs.union(needs)
            if union == group.needs:
                return
            if group.running:
                raise CommError("The heap cannot grow while a call is in flight. Make all layers before the first call.")
            group.carve(target, union)

    def run(self, launch: Callable[[], None]) -> None:
        """Run one launch of this rank, unless an earlier call has failed."""
        self.check()
        group = self._group
        with group.lock:
            group.running += 1
        try:
            launch()
        finally:
            with group.lock:
                group.running -= 1

    def _require_open(self) -> None:
        if self._group.closed:
            raise CommError("The communicator is closed.")


def _world_of_launcher() -> tuple[str, int]:
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            return name, int(value)
    return "", 1


def init(
    method: Literal["auto", "mpi", "torch", "slurm", "single"] = "auto", *, heap_bytes: int | None = None
) -> Communicator:
    """The communicator of this process.

    Args:
        method: ``"single"``: one rank. ``"auto"``: one rank too, unless a launcher started several processes.
        heap_bytes: size of the symmetric heap; default: what the layers need.

    Raises:
        UnsupportedError: several processes. This version's ranks live in one process: :func:`local_group`.
        SpecError: unknown method.
    """
    if method not in ("auto", "mpi", "torch", "slurm", "single"):
        raise SpecError(f"method={method!r} is not valid. Must be 'auto', 'mpi', 'torch', 'slurm' or 'single'.")
    variable, processes = _world_of_launcher()
    if method in ("mpi", "torch", "slurm") or (method == "auto" and processes > 1):
        why = f"{variable}={processes} says so; " if method == "auto" else ""
        raise UnsupportedError(
            f"method={method!r}: ranks in several processes are not supported ({why}it needs NVSHMEM). "
            "Supported: 'single', and comm.local_group(world_size) for several ranks in one process."
        )
    return Communicator(_Group(1, heap_bytes), 0)


def local_group(world_size: int, *, heap_bytes: int | None = None) -> list[Communicator]:
    """In-process ranks, one communicator per rank; on the host target use each from a thread of its own.

    Args:
        world_size: 1 to 8.
        heap_bytes: limit of one rank's symmetric heap; default: what the layers need.

    Raises:
        SpecError: ``world_size`` out of range.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= MAX_WORLD_SIZE:
        raise SpecError(f"world_size={world_size!r} is not valid. Must be between 1 and {MAX_WORLD_SIZE}.")
    group = _Group(world_size, heap_bytes)
    return [Communicator(group, rank) for rank in range(world_size)]
