"""Ranks that are processes of one machine: a rank each, with heaps in memory that they share, or on GPUs."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import env, packages
from ..errors import CommError, FlashMoEError, SpecError, UnsupportedError
from ..launch.cuda import CudaTarget, device_count, require_device
from ..launch.host import HostTarget
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from .agreement import cannot, clear, disagreement, laid_out, no_longer_fits
from .base import ABORTED_AT, Heaps, HeapSource, Restarts, Words
from .board import CLOSE, RESET, Board
from .bootstrap import Bootstrap
from .calls import reason, require_sound
from .heaps import HostHeapSource, share
from .shared import Process, SharedMemory, decode, encode

T = TypeVar("T")

BUILD_S = 1800.0  # deadline of what waits for compilers; a rank that has ended is noticed at once


# ---- The transport ----------------------------------------------------------------------------------------------------


class ProcessTransport:
    """One process's end of a group; see :class:`~flashmoe_gen.comm.base.Transport`.

    Args:
        memory: that the group's words are in.
        rank: this rank.
        processes: of the ranks.
        target: where it runs.
        sharing: how many ranks share its processor.
        device: number of its GPU, or ``None``.
        heap_bytes: size of its heap; ``None``: what the layers need.
    """

    node = 0

    def __init__(
        self,
        memory: SharedMemory,
        rank: int,
        processes: Sequence[Process],
        target: Target,
        *,
        sharing: int,
        device: int | None,
        heap_bytes: int | None,
    ) -> None:
        self.rank = self.local_rank = rank
        self.world_size = len(processes)
        self.ranks_here: tuple[int, ...] = (rank,)
        self.sharing, self.device, self.target = sharing, device, target
        self._board = Board(memory, rank, processes)
        self.words: Words = self._board
        self.words.keep_record(0, target.record(self.words.records[0]))
        self._processes, self._heap_bytes = processes, heap_bytes
        self._source: HeapSource = HostHeapSource(rank, self.world_size, self._trade)
        self._heaps: Heaps | None = None
        self._asked = HeapNeeds()
        self._layout = HeapLayout.of(self._asked, self.world_size)
        self._layers: weakref.WeakSet[Restarts] = weakref.WeakSet()
        self._parts: weakref.WeakSet[ProcessTransport] = weakref.WeakSet()
        weakref.finalize(self, self._board.depart)  # at the end of the interpreter too; waits for nobody
        _transports.add(self)

    def use(self, source: HeapSource) -> None:
        """Collective: take heaps from here, at once if their size is known.

        Raises:
            CommError: no memory.
        """
        self._source = source
        if self._heap_bytes is not None:
            laid_out(self._asked, self.world_size, self._heap_bytes)  # raises when nothing would fit
            self._heaps = self._allocate(self._heap_bytes)

    def _allocate(self, nbytes: int) -> Heaps:
        heaps, why = None, ""
        try:
            heaps = self._source.allocate(nbytes)
        except FlashMoEError as error:
            why = str(error)
        for told in self._trade(why):
            if told:
                raise CommError(told)
        assert heaps is not None
        return heaps

    def _trade(self, value: Any) -> list[Any]:
        return self.exchange(value, "the making of heaps")

    # Memory ----------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> HeapLayout:
        return self._layout

    @property
    def record(self) -> np.ndarray[Any, Any]:
        return self.words.records[0]

    @property
    def pointers(self) -> list[int]:
        return [] if self._heaps is None else self._heaps.pointers

    def heap(self, rank: int) -> Memory:
        assert rank == self.rank and self._heaps is not None
        return self._heaps.mine

    def bind(self, target: Target) -> None:
        mine = self.target
        if (mine.name, mine.device) != (target.name, target.device):
            raise CommError(f"The communicator runs on {mine.device}; this layer would run on {target.device}.")

    def _fit(self, needs: HeapNeeds) -> None:
        if self._heaps is not None and not needs.fits(self._layout.needs):
            return
        if any(self._trade(self.words.called)):
            raise no_longer_fits(self._layout, needs)
        asked = self._asked.union(needs)
        layout, before = laid_out(asked, self.world_size, self._heap_bytes), None
        self.target.synchronize()
        if self._heap_bytes is None:
            before, self._heaps = self._heaps, self._allocate(layout.bytes)
        assert self._heaps is not None
        with self.words.lock:
            self._layout, self._asked = layout, asked
            clear(self._heaps.mine, layout)
            self._restarted()
        self._trade(None)  # nobody's kernels store before all have come so far
        if before is not None:
            before.release(abort=False)

    def _restarted(self) -> None:
        self.words.generation += 1
        for layer in list(self._layers):
            layer.restart()

    def attach(self, layer: Restarts) -> None:
        with self.words.lock:
            self._layers.add(layer)

    def clear(self) -> None:
        with self.words.lock:
            self.target.synchronize()
            if self._heaps is not None:
                clear(self._heaps.mine, self._layout)
            self.record[:] = 0
            self._restarted()
            self._board.forget()

    # Collectives -----------------------------------------------------------------------------------------------------

    def exchange(self, value: T, what: str) -> list[T]:
        return self._exchange(value, what, env.timeout_s())

    def _exchange(self, value: Any, what: str, seconds: float) -> list[Any]:
        def sound() -> None:
            if (self.words.closed and what != CLOSE) or what not in (RESET, CLOSE):
                require_sound(self.words)

        try:
            return self._board.exchange(value, what, seconds, sound)
        except Exception:
            raise
        except BaseException as error:  # Ctrl-C: peers may wait for this rank, which goes elsewhere
            self.fail(f"Rank {self.rank} raised {reason(error)}")
            raise

    def agree(self, what: str, value: Mapping[str, Any] | BaseException, needs: HeapNeeds | None = None) -> None:
        place, timeout = f"the making of {what}", env.timeout_s()
        deadline = max(BUILD_S, timeout) if timeout else 0.0
        if isinstance(value, Exception):
            with suppress(CommError):
                self._exchange((None, reason(value)), place, deadline)
        elif isinstance(value, BaseException):  # Ctrl-C does not wait
            self.fail(f"Rank {self.rank} raised {reason(value)}")
        else:
            said = self._exchange((dict(value), ""), place, deadline)
            for rank, (_, why) in enumerate(said):
                if why:
                    raise CommError(cannot(rank, what, why))
            if why := disagreement(what, {rank: values for rank, (values, _) in enumerate(said)}):
                raise CommError(why)
            if needs is not None:
                self._fit(needs)

    def await_agreement(self, what: str) -> None:
        pass  # agree() has waited

    def split(self, members: Sequence[int]) -> ProcessTransport:
        def among(value: Any) -> list[Any]:
            told = self.exchange(value, "split()")
            return [told[member] for member in members]

        rank = list(members).index(self.rank)
        memory = share(Board.nbytes(len(members)), rank, among)
        processes = [self._processes[member] for member in members]
        made = ProcessTransport(
            memory,
            rank,
            processes,
            self.target,
            sharing=self.sharing,
            device=self.device,
            heap_bytes=self._heap_bytes,
        )
        made.use(self._source.part(members, made._trade))
        self._parts.add(made)
        return made

    # What ranks tell each other outside collectives ------------------------------------------------------------------

    def fail(self, why: str) -> None:
        with self.words.lock:
            if self._board.disowned:
                return
            self._board.fail(why)
            for launch in list(self.words.launches):
                launch.stop.value = 1
            if self._heaps is not None:
                self._heaps.interrupt(ABORTED_AT)

    def ended(self) -> list[int]:
        return [peer for peer in range(self.world_size) if self._board.ended(peer)]

    def depart(self) -> None:
        self._board.depart()

    def release(self, *, abort: bool) -> None:
        if not abort:
            self.target.synchronize()
        if self._source.collective:  # what it gives back, its parts use
            for part in list(self._parts):
                part.depart()
            if not abort:
                try:
                    self.exchange(None, CLOSE)  # after it no kernel runs on any rank
                except CommError:
                    abort = True
        if self._heaps is not None:
            self._heaps.release(abort=abort)
        self._source.close(abort=abort)


_transports: weakref.WeakSet[ProcessTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_transports):
        transport._board.disown()


os.register_at_fork(after_in_child=_after_fork)


# ---- Joining ----------------------------------------------------------------------------------------------------------


def join(bootstrap: Bootstrap, *, target: str | None, device: int | None, heap_bytes: int | None) -> ProcessTransport:
    """Collective: make a group of the processes that a launcher has started.

    Args:
        bootstrap: how they find each other; not needed afterwards.
        target: ``"host"`` or ``"cuda"``; ``None``: ``FLASHMOE_TARGET``, else whether there is a GPU.
        device: number of this rank's GPU; ``None``: the next one for each rank.
        heap_bytes: size of the symmetric heap, allocated now; ``None``: what the layers need, when they are made.

    Raises:
        SpecError: an argument is not valid.
        CommError: on all ranks: the processes do not fit together, or one of them cannot join.
        UnsupportedError: they are on several machines.
    """
    rank, world = bootstrap.rank, bootstrap.world_size
    memory, place, failed = None, None, None
    mine: dict[str, Any] = {"error": ""}
    try:
        place = _Place(target, device, rank)
        memory = SharedMemory.make(Board.nbytes(world)) if rank == 0 else None
        mine |= place.facts | {"heap_bytes": heap_bytes, "world_size": world, "method": bootstrap.method}
        mine["memory"] = memory.handle if memory is not None else None
    except Exception as error:
        failed, mine["error"] = error, reason(error)
    facts = [decode(data) for data in bootstrap.gather(encode(mine), "init()")]
    if failed is not None:
        raise failed
    _require_alike(facts)
    try:
        memory = memory or SharedMemory.open(facts[0]["memory"])
    except CommError as error:
        failed = error
    for peer, told in enumerate(bootstrap.gather(encode(str(failed or "")), "init()")):
        if decode(told):
            raise CommError(f"Rank {peer} cannot join: {decode(told)}")
    assert memory is not None and place is not None
    processes = [Process(*each["process"]) for each in facts]
    sharing = max(sum(core in each["cores"] for each in facts) for core in mine["cores"]) if place.device is None else 1
    transport = ProcessTransport(
        memory, rank, processes, place.target(sharing), sharing=sharing, device=place.device, heap_bytes=heap_bytes
    )
    transport.use(_source(transport, place.device, heap_bytes))
    return transport


class _Place:
    """Where a process runs, as far as it can tell by itself.

    Attributes:
        device: number of its GPU; ``None``: the CPU.
        facts: for the other ranks.
    """

    def __init__(self, target: str | None, device: int | None, rank: int) -> None:
        from .. import __version__  # not there yet when this module is imported

        name = target or env.target() or ("cuda" if device is not None or device_count() > 0 else "host")
        if name not in ("host", "cuda"):
            raise SpecError(f"target={target!r} is not valid. Must be 'host' or 'cuda'.")
        if name == "host" and device is not None:
            raise SpecError("device= is not valid for target='host'.")
        if name == "cuda":
            require_device()
        self.device = None if name == "host" else rank % max(1, device_count()) if device is None else device
        self.facts: dict[str, Any] = {
            "version": __version__,
            "target": name,
            "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "host": socket.gethostname(),
            "process": tuple(Process.mine()),
            "cores": sorted(os.sched_getaffinity(0)),
            "gpu": "" if self.device is None else _uuid(self.device),
        }

    def target(self, sharing: int) -> Target:
        return HostTarget(sharing) if self.device is None else CudaTarget(device=self.device)


def _uuid(device: int) -> str:
    properties = packages.import_cupy().cuda.runtime.getDeviceProperties(device)
    return str(bytes(properties["uuid"]).hex())


def _require_alike(facts: Sequence[Mapping[str, Any]]) -> None:
    for rank, each in enumerate(facts):
        if each["error"]:
            raise CommError(f"Rank {rank} cannot join: {each['error']}")
    if len({each["machine"] for each in facts}) > 1:
        hosts = ", ".join(f"rank {rank} on {each['host']}" for rank, each in enumerate(facts))
        raise UnsupportedError(f"The ranks are on several machines ({hosts}): several machines are not supported yet.")
    for name in ("version", "method", "world_size", "target", "heap_bytes"):
        if why := disagreement("how they start", {rank: {name: each[name]} for rank, each in enumerate(facts)}):
            raise CommError(why)
    first: dict[str, int] = {}
    for rank, each in enumerate(facts):
        if each["gpu"] and first.setdefault(each["gpu"], rank) != rank:
            raise CommError(
                f"Ranks {first[each['gpu']]} and {rank} are both on GPU {each['gpu']}. Each needs a GPU of its own: start as many "
                "processes as there are GPUs, or choose them with device=."
            )


def _source(transport: ProcessTransport, device: int | None, heap_bytes: int | None) -> HeapSource:
    if device is None:
        return HostHeapSource(transport.rank, transport.world_size, transport._trade)
    from .nvshmem import NvshmemSource

    return NvshmemSource.join(transport.rank, transport.world_size, device, transport._trade, heap_bytes)
