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

from ..errors import CommError, SpecError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from ..scratch import Scratches
from .base import Called, Launch, Restarts, Transport
from .calls import Calls

T = TypeVar("T")


class Communicator:
    """One rank's end of a group of ranks. Made by :func:`init` or :func:`local_group`.

    Calls of one rank never overlap. With one rank, calls from several threads wait for each other. With several ranks their
    order must be the same on all of them, so a call while another thread's call is in flight raises :class:`CommError`.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
        ranks_here: ranks of this communicator in this process, ascending.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self._words, self._calls = transport, transport.words, Calls(transport)
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.local_rank, self.ranks_here = transport.local_rank, transport.ranks_here
        self.lock = threading.RLock()  # held by whoever uses what the rank's calls use
        self._inside: Callable[[], object] = _nothing  # what lives as long as a call of this rank
        self._stream: Any = None  # of the last launch
        self.scratches = Scratches()  # what its layers share
        _communicators.add(self)

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
        self._calls.require_open()
        self._transport.exchange(None, "barrier()")

    def split(self, color: int, key: int | None = None) -> Communicator:
        """Collective: a new communicator of the ranks that passed the same ``color``, ordered by ``key`` (default: rank).

        It has a heap of its own.

        Raises:
            SpecError: ``color`` or ``key`` is not an integer.
            CommError: closed, or a rank does not take part.
        """
        self._calls.require_open()
        for name, value in (("color", color), ("key", 0 if key is None else key)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise SpecError(f"{name}={value!r} is not valid. Must be an integer.")
        votes = self._transport.exchange((int(color), self.rank if key is None else int(key)), "split()")
        members = sorted((vote[1], rank) for rank, vote in enumerate(votes) if vote[0] == color)
        return Communicator(self._transport.split([rank for _, rank in members]))

    def check(self) -> None:
        """Raise what a past call of any rank left behind; return if all is well.

        Raises:
            KernelTimeoutError: a wait of this rank passed its deadline.
            CommError: closed, or another rank failed.
        """
        self._calls.check()

    def reset(self) -> None:
        """Collective: forget a failure and start afresh; every rank calls it, no call may be in flight.

        Raises:
            CommError: closed, a call is in flight, or a rank did not come.
        """
        self._calls.require_open()
        transport, words, idle = self._transport, self._words, True
        transport.exchange(None, "reset()")
        if self.rank == self.ranks_here[0]:
            with words.lock:
                idle = not words.launches
                if idle:
                    transport.clear()
        if not all(transport.exchange(idle, "reset()")):  # after it others may already be in their next call
            raise CommError("reset() while a call is in flight on some rank.")

    def close(self, *, abort: bool = False) -> None:
        """Give the communicator up, for all ranks of this process; every later use raises :class:`CommError`.

        Waits for this rank's call in flight. ``abort=True`` waits for nobody: it ends the calls in flight on every rank, whose
        callers get a :class:`CommError`.
        """
        if abort:
            self._transport.fail(f"rank {self.rank} has closed it with abort=True.")
            self._transport.close()
        else:
            with self.lock:
                self.require_outside("close()")
                self.leave(None, "its communicator")
                self._transport.close()

    # What layers use -------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Changes whenever signals and epochs start from zero, maybe in other memory."""
        return self._words.generation

    @property
    def heap(self) -> HeapLayout:
        """Layout of the symmetric heap."""
        return self._transport.layout

    @property
    def target(self) -> str | None:
        """Where its layers run, ``"host"`` or ``"cuda"``; ``None`` before the first one."""
        return target.name if (target := self._transport.target) is not None else None

    def heap_memory(self, rank: int) -> Memory:
        """The heap of one rank of this process."""
        return self._transport.heap(rank)

    def heap_pointers(self) -> list[int]:
        """Where each rank's heap starts, as kernels of this rank see it."""
        return self._transport.pointers

    def attach(self, layer: Restarts) -> None:
        """From now on, and as long as it lives, a layer's counters start from zero whenever the signals do."""
        self._transport.attach(layer)

    @property
    def record(self) -> np.ndarray[Any, Any]:
        """The abort record kernels of this rank fill."""
        return self._transport.record

    def reserve(self, target: Target, needs: HeapNeeds) -> None:
        """Make the heap large enough for one more layer.

        Raises:
            CommError: closed, over ``heap_bytes``, bound to another target, or a call is in flight while the heap has to grow.
        """
        self._calls.require_open()
        with self._words.lock:
            self._transport.bind(target)
            self._transport.reserve(needs)

    def register(self, description: Mapping[str, Any]) -> int:
        """Say that this rank has made its next layer, and what all ranks must have made alike; its number."""
        return self._calls.made(description)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around the making of a layer: peers that wait for it learn of a failure."""
        self._calls.attempt()
        try:
            yield
        except BaseException as error:
            self._calls.unmade(error)
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
            calls, token = self._calls, _Token()
            begun = calls.begun
            try:
                self._inside = weakref.ref(token)
                calls.check()
                if self.world_size > 1:
                    calls.meet(layer)
                return work()
            except BaseException as error:
                calls.refuse(error, begun)
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
        if self._calls.meeting:  # the other call waits for peers that may never come
            self._transport.fail(why)
        raise CommError(why)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other ranks of an error, if they are, or will be, in a call that this rank does not make."""
        begun = self._calls.begun
        try:
            yield
        except BaseException as error:
            self._calls.refuse(error, begun)
            raise

    def leave(self, layer: int | None, what: str) -> None:
        """Tell peers that are in a call which this rank will not make, because it closes a layer, or all of them."""
        self._calls.leave(layer, what)

    def run(
        self, target: Target, stream: Any, called: Called, generation: int, launch: Callable[[ctypes.c_uint32 | None], None]
    ) -> None:
        """Begin this rank's next call, and run its launch after what the rank launched before on other streams.

        Raises:
            MovedError: see :meth:`flashmoe_gen.comm.calls.Calls.begin`.
            KernelTimeoutError, CommError: the call has ended in failure (synchronous targets).
        """
        target.follow(stream, self._stream)
        if not target.synchronous:
            self._calls.begin(called, generation, None)
            launch(None)
            self._stream = stream
            return
        flight, words = Launch(), self._words
        self._calls.begin(called, generation, flight)
        try:
            launch(flight.stop)
        finally:
            words.launches.discard(flight)
            if flight.stop.value and self.world_size == 1 and not words.failure:
                self._transport.clear()  # nobody else has a part in what it left behind
        self._calls.require_success()
        if flight.stop.value:
            raise CommError("The call was ended before it was done.")

    @contextmanager
    def launching(self) -> Iterator[ctypes.c_uint32]:
        """Around a launch that no peer waits for; yields what ends it early.

        Raises:
            CommError, KernelTimeoutError: it was ended, because the communicator has failed.
        """
        self._calls.check()
        flight = self._calls.launch()
        try:
            yield flight.stop
        finally:
            self._words.launches.discard(flight)
        if flight.stop.value:
            self._calls.require_success()
            raise CommError("The call was ended before it was done.")


class _Token:
    """Lives as long as a call."""


def _nothing() -> None:
    return None


_communicators: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: a thread that was in a call is not here."""
    for communicator in list(_communicators):
        communicator.lock = threading.RLock()
        communicator._inside = _nothing


os.register_at_fork(after_in_child=_after_fork)
