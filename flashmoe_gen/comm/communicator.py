"""One rank's end of a communicator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..args import AWAITS, ROLES
from ..errors import CommError, KernelTimeoutError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from .group import Group, Restarts


class Communicator:
    """One rank's end of a group of ranks. Made by :func:`init` or :func:`local_group`.

    Calls of one rank never overlap. With one rank, calls from several threads wait for each other. With several ranks their
    order must be the same on all of them, so a call while another thread's call is in flight raises :class:`CommError`.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
    """

    def __init__(self, group: Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size
        self.local_rank = rank
        self.lock = threading.RLock()  # held by whoever uses what the rank's calls use
        self._turn = threading.Lock()  # held during a call
        self._met = 0  # layers that all ranks are known to have made
        self._meeting = False
        self._stream: Any = None  # of the last launch

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
            group.exchange[-1 - color] = Group(len(ranks), group.heap_bytes)
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
        self._raise_failure()

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
        """Give the communicator up, for all ranks of this process; every later use raises :class:`CommError`.

        Waits for this rank's call in flight. ``abort=True`` waits for nobody: it ends the calls in flight on every rank, whose
        callers get a :class:`CommError`.
        """
        if abort:
            self._group.fail(f"rank {self.rank} has closed it with abort=True.")
            self._group.closed = True
        else:
            with self.lock:
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

    def attach(self, layer: Restarts) -> None:
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

    def register(self, description: Mapping[str, Any]) -> int:
        """Say that this rank has made its next layer, and what all ranks must have made alike; its number."""
        group = self._group
        with group.lock:
            group.made[self.rank].append(description)
            group.unmade.pop(self.rank, None)
            group.changed.notify_all()
            return len(group.made[self.rank]) - 1

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around the making of a layer: peers that wait for it learn of a failure."""
        group = self._group
        try:
            yield
        except BaseException as error:
            with group.lock:
                group.unmade[self.rank] = _reason(error)
                group.changed.notify_all()
            raise

    def call(self, layer: int) -> _Call:
        """Around one call of a layer: no other call of this rank meanwhile, and peers learn of a failure.

        Raises:
            CommError: closed, failed, refused by a peer, not made by all ranks; or (several ranks) another thread calls.
            KernelTimeoutError: as :meth:`check`.
        """
        return _Call(self, layer)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other ranks of an error, if they are, or will be, in a call that this rank does not make."""
        begun = self._group.begun[self.rank]
        try:
            yield
        except BaseException as error:
            self._tell(error, begun)
            raise

    def _tell(self, error: BaseException, begun: int) -> None:
        """``begun``: how many calls this rank had begun before what raised."""
        group, why = self._group, f"Rank {self.rank} raised {_reason(error)}"
        interrupted = not isinstance(error, Exception)
        with group.lock:
            if self.world_size == 1:
                if interrupted and group.running == 0:
                    group.clear()
            elif interrupted or group.begun[self.rank] != begun or max(group.begun) > begun:
                group.fail(why)
            elif not group.failure:
                group.refused[self.rank] = why  # until it makes the call after all

    def _take_turn(self) -> None:
        if self._turn.acquire(blocking=False):
            return
        why = (
            f"Rank {self.rank} is called from two threads at the same time. With several ranks, calls of a rank must follow "
            "each other; each rank needs a communicator of its own."
        )
        if self._meeting:  # the other call waits for peers that may never come
            self._group.fail(why)
        raise CommError(why)

    def _meet(self, layer: int) -> None:
        """Wait for peers that have not made the layer yet; raise if one has refused the call that this rank begins."""
        group = self._group
        if layer >= self._met:
            self._meeting = True
            try:
                group.await_layer(self.rank, layer)
            finally:
                self._meeting = False
            self._met = layer + 1
        with group.lock:
            for peer, why in group.refused.items():
                if peer != self.rank and group.begun[peer] <= group.begun[self.rank]:
                    group.fail(why)
        self._raise_failure()

    def run(self, target: Target, stream: Any, launch: Callable[[np.ndarray[Any, Any]], None]) -> None:
        """Run one launch of this rank, after what it launched before on other streams.

        Raises:
            KernelTimeoutError, CommError: the call has ended in failure (synchronous targets).
        """
        group = self._group
        target.follow(stream, self._stream)
        with group.lock:
            group.running += 1
            group.begun[self.rank] += 1
            group.refused.pop(self.rank, None)
        try:
            launch(group.stop)
        finally:
            with group.lock:
                group.running -= 1
        self._stream = stream
        if target.synchronous:
            self._raise_failure()

    @contextmanager
    def stopping(self) -> Iterator[np.ndarray[Any, Any]]:
        """Around a launch that no peer waits for; yields what ends it early.

        Raises:
            CommError, KernelTimeoutError: it was ended, because of another call.
        """
        self.check()
        group = self._group
        stops = group.stops
        with self.telling():
            yield group.stop
            self._raise_failure()
            if group.stop[0] or group.stops != stops:
                raise CommError("The call was ended: another one was interrupted.")

    def _raise_failure(self) -> None:
        group = self._group
        if not group.failure and not any(flag.value for flag in group.filled):  # every call comes by here
            return
        record = group.records[self.rank][0]
        if record["filled"]:
            raise KernelTimeoutError(
                rank=int(record["rank"]),
                block=int(record["block"]),
                role=ROLES[record["role"]],
                waiting_for=AWAITS[record["what"]].format(detail=int(record["detail"])),
                expected=int(record["expected"]),
                seen=int(record["seen"]),
            )
        late = [f"a wait of rank {rank} passed its deadline." for rank, flag in enumerate(group.filled) if flag.value]
        raise CommError(f"The communicator has failed: {(late or [group.failure])[0]} Call reset() on every rank.")

    def _require_open(self) -> None:
        if self._group.closed:
            raise CommError("The communicator is closed.")


class _Call:
    """A context manager of few steps: it is on the way of every call."""

    __slots__ = ("_begun", "_comm", "_layer")

    def __init__(self, comm: Communicator, layer: int) -> None:
        self._comm, self._layer = comm, layer

    def __enter__(self) -> None:
        comm = self._comm
        if comm.world_size > 1:
            comm._take_turn()
        comm.lock.acquire()
        self._begun = comm._group.begun[comm.rank]
        try:
            comm.check()
            if comm.world_size > 1:
                comm._meet(self._layer)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        comm = self._comm
        try:
            if error is not None:
                comm._tell(error, self._begun)
        finally:
            comm.lock.release()
            if comm.world_size > 1:
                comm._turn.release()


def _reason(error: BaseException) -> str:
    """An error in one line, which ends with a full stop."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":.")
    return f"{text}."
