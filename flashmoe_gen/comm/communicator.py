"""One rank's end of a communicator."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ..args import AWAITS, ROLES
from ..errors import CommError, KernelTimeoutError, SpecError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from .group import Group, Launch, Restarts

T = TypeVar("T")


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
        self.renew_locks()
        self._inside: Callable[[], object] = _nothing  # what lives as long as a call of this rank
        self._met = 0  # layers that all ranks are known to have made
        self._meeting = False
        self._stream: Any = None  # of the last launch
        _communicators.add(self)

    def renew_locks(self) -> None:
        self.lock = threading.RLock()  # held by whoever uses what the rank's calls use

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
        self._group.meet(self.rank, "barrier()")

    def split(self, color: int, key: int | None = None) -> Communicator:
        """Collective: a new communicator of the ranks that passed the same ``color``, ordered by ``key`` (default: rank).

        It has a heap of its own.

        Raises:
            SpecError: ``color`` or ``key`` is not an integer.
            CommError: closed, or a rank does not take part.
        """
        self._require_open()
        for name, value in (("color", color), ("key", 0 if key is None else key)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise SpecError(f"{name}={value!r} is not valid. Must be an integer.")
        group = self._group
        group.exchange["vote", self.rank] = (int(color), self.rank if key is None else int(key))
        group.meet(self.rank, "split()")
        votes = {rank: group.exchange["vote", rank] for rank in range(self.world_size)}
        members = sorted((vote[1], rank) for rank, vote in votes.items() if vote[0] == color)
        ranks = [rank for _, rank in members]
        if self.rank == ranks[0]:
            group.exchange["group", int(color)] = Group(len(ranks), group.heap_bytes)
        group.meet(self.rank, "split()")
        shared = group.exchange["group", int(color)]
        group.meet(self.rank, "split()")
        group.exchange.pop(("group", int(color)), None)
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
        group.meet(self.rank, "reset()")
        if self.rank == 0:
            with group.lock:
                group.exchange["cleared"] = not group.running
                if not group.running:
                    group.clear()
        group.meet(self.rank, "reset()")  # after it others may already be in their next call
        if not group.exchange["cleared"]:
            raise CommError("reset() while a call is in flight on some rank.")

    def close(self, *, abort: bool = False) -> None:
        """Give the communicator up, for all ranks of this process; every later use raises :class:`CommError`.

        Waits for this rank's call in flight. ``abort=True`` waits for nobody: it ends the calls in flight on every rank, whose
        callers get a :class:`CommError`.
        """
        group = self._group
        if abort:
            group.fail(f"rank {self.rank} has closed it with abort=True.")
            self._end()
        else:
            with self.lock:
                self.require_outside("close()")
                self.leave(None, "its communicator")
                self._end()

    def _end(self) -> None:
        with self._group.lock:
            self._group.closed = True
            self._group.changed.notify_all()

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
        with group.lock:
            group.attempts[self.rank] += 1
        try:
            yield
        except BaseException as error:
            with group.lock:
                group.unmade[self.rank] = group.attempts[self.rank], _reason(error)
                group.changed.notify_all()
            raise

    def call(self, layer: int, work: Callable[[], T]) -> T:
        """Make one call of a layer: no other call of this rank meanwhile, and peers learn of a failure.

        Raises:
            CommError: closed, failed, refused by a peer, not made by all ranks; or (several ranks) another thread calls.
            KernelTimeoutError: as :meth:`check`.
        """
        if self.world_size > 1 and self._inside() is not None:
            self._refuse_overlap()
        with self.lock:  # not acquire() before a try: an interrupt may come between the two
            self.require_outside("a call")
            begun, token = self._group.begun[self.rank], _Token()
            try:
                self._inside = weakref.ref(token)
                self.check()
                if self.world_size > 1:
                    self._meet(layer)
                return work()
            except BaseException as error:
                self._tell(error, begun)
                raise
            finally:
                self._inside = _nothing

    def require_outside(self, what: str) -> None:
        """Raise if this thread, which has the lock, is in a call: a signal handler must not change what the call uses."""
        if self._inside() is not None:
            raise CommError(f"{what} inside a call of the same rank (in a signal handler?). Must wait until the call has ended.")

    def _refuse_overlap(self) -> None:
        why = (
            f"Rank {self.rank} is called from two threads at the same time. With several ranks, calls of a rank must follow "
            "each other; each rank needs a communicator of its own."
        )
        if self._meeting:  # the other call waits for peers that may never come
            self._group.fail(why)
        raise CommError(why)

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
        if self.world_size == 1:
            return
        with group.lock:
            if not isinstance(error, Exception) or group.begun[self.rank] != begun or max(group.begun) > begun:
                group.fail(why)
            elif not group.failure:
                group.refused[self.rank] = why  # until it makes the call after all

    def leave(self, layer: int | None, what: str) -> None:
        """Tell peers that are in a call which this rank will not make, because it closes a layer, or all of them."""
        group = self._group
        with group.lock:
            turn = group.turns.get(group.begun[self.rank])
            if turn is not None and layer in (None, turn[1][0]):
                group.fail(f"rank {self.rank} has closed {what}.")

    def _meet(self, layer: int) -> None:
        """Wait for peers that have not made the layer yet; raise if one has refused the call that this rank begins."""
        group = self._group
        if layer >= self._met:
            try:
                self._meeting = True
                group.await_layer(self.rank, layer)
            finally:
                self._meeting = False
            self._met = layer + 1
        group.require_peers(self.rank)

    def run(
        self, target: Target, stream: Any, called: Any, generation: int, launch: Callable[[ctypes.c_uint32 | None], None]
    ) -> None:
        """Begin this rank's next call, and run its launch after what the rank launched before on other streams.

        Raises:
            MovedError: see :meth:`flashmoe_gen.comm.group.Group.begin`.
            KernelTimeoutError, CommError: the call has ended in failure (synchronous targets).
        """
        group = self._group
        target.follow(stream, self._stream)
        if not target.synchronous:
            group.begin(self.rank, called, generation, None)
            launch(None)
            self._stream = stream
            return
        flight = Launch()
        group.begin(self.rank, called, generation, flight)
        try:
            launch(flight.stop)
        finally:
            group.launches.discard(flight)
            if flight.stop.value and self.world_size == 1 and not group.failure:
                group.clear()  # nobody else has a part in what it left behind
        self._raise_failure()
        if flight.stop.value:
            raise CommError("The call was ended before it was done.")

    @contextmanager
    def launching(self) -> Iterator[ctypes.c_uint32]:
        """Around a launch that no peer waits for; yields what ends it early.

        Raises:
            CommError, KernelTimeoutError: it was ended, because the communicator has failed.
        """
        self.check()
        flight = self._group.launch()
        try:
            yield flight.stop
        finally:
            self._group.launches.discard(flight)
        if flight.stop.value:
            self._raise_failure()
            raise CommError("The call was ended before it was done.")

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
        if late and not group.failure:
            raise CommError(f"The communicator has failed: {late[0]} Call reset() on every rank.")
        group.require_sound()

    def _require_open(self) -> None:
        if self._group.closed:
            self._group.require_sound()


def _reason(error: BaseException) -> str:
    """An error in one line, which ends with a full stop."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":.")
    return f"{text}."


class _Token:
    """Lives as long as a call."""


def _nothing() -> None:
    return None


_communicators: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: a thread that was in a call is not here."""
    for communicator in list(_communicators):
        communicator.renew_locks()
        communicator._inside = _nothing


os.register_at_fork(after_in_child=_after_fork)
