"""One rank's end of a communicator."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ..errors import CommError, SpecError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from ..scratch import Scratches
from ..spec import MoESpec
from .base import Lane, Launch, Restarts, Transport
from .calls import Calls

T = TypeVar("T")
Agree = Callable[..., int]


class Communicator:
    """One rank's end of a group of ranks. Made by :func:`init` or :func:`local_group`.

    Calls of one rank never overlap. With one rank, calls from several threads wait for each other. With several ranks their
    order must be the same on all of them, so a call while another thread's call is in flight raises :class:`CommError`.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
        node: number of its machine.
        ranks_here: ranks of this communicator in this process, ascending.
        sharing: how many ranks share the processor this rank runs on.
        device: number of the GPU that this rank must run on; ``None``: any, or the host.
        scratches: the memory beside the heap that its layers share.
        lane: the order of this rank's launches, across its communicators.
    """

    def __init__(self, transport: Transport, lane: Lane | None = None) -> None:
        self._transport, self._words, self._calls = transport, transport.words, Calls(transport)
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.local_rank, self.node, self.ranks_here = transport.local_rank, transport.node, transport.ranks_here
        self.sharing, self.device = transport.sharing, transport.device
        self.lock = threading.RLock()  # held by whoever uses what the rank's calls use
        self._inside: Callable[[], object] = _nothing  # what lives as long as a call of this rank
        self.scratches = Scratches()
        transport.attach(self.scratches)
        self.lane = lane or Lane()
        self._made: Counter[str] = Counter()  # what all ranks have agreed on: layers, placements, reservations
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
        return Communicator(self._transport.split([rank for _, rank in members]), self.lane)

    def reserve(self, *specs: MoESpec) -> None:
        """Collective: lay out the heap for layers of these specs, before the first call. It stays where it is from then on, so
        that what comes later must fit.

        Raises:
            SpecError: not a spec, or of another world size.
            CommError: closed, the ranks pass different specs, no memory, over ``heap_bytes``, or they do not fit any more.
        """
        with self.agreeing("reservation {n}") as agree:
            needs = HeapNeeds()
            for spec in specs:
                if not isinstance(spec, MoESpec):
                    raise SpecError(f"reserve() got a {type(spec).__name__}. Must be specs.")
                if spec.world_size != self.world_size:
                    raise SpecError(
                        f"reserve() got world_size={spec.world_size}. Must be {self.world_size}, as the communicator's."
                    )
                needs = needs.union(HeapNeeds.of(spec))
            agree({}, needs)

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
        if transport.target is not None:
            transport.target.synchronize()
        transport.exchange(None, "reset()")  # after it no kernel runs on any rank
        if self.rank == self.ranks_here[0]:
            with words.lock:
                idle = not words.launches
                if idle:
                    transport.clear()
        while None in (told := transport.exchange(idle, "reset()")):
            pass  # a rank was interrupted between the two exchanges, and begins again
        if not all(told):  # after it others may already be in their next call
            raise CommError("reset() while a call is in flight on some rank.")

    def close(self, *, abort: bool = False) -> None:
        """Give the communicator up, for all ranks of this process; every later use raises :class:`CommError`.

        Waits for this rank's call in flight, and where processes give memory back together, for the other ranks, at most
        ``FLASHMOE_TIMEOUT_S``. ``abort=True`` waits for nobody: it ends the calls in flight on every rank, whose callers get a
        :class:`CommError`, and keeps memory that peers may still store into until the process ends.
        """
        if self._words.closed:
            return
        if abort:
            self._transport.fail(f"rank {self.rank} has closed it with abort=True.")
            self._transport.depart()
            self._transport.release(abort=True)
        else:
            with self.lock:
                self.require_outside("close()")
                with self._words.lock:  # whoever is woken learns of both
                    self._transport.depart()
                    self.leave(None, "its communicator")
                self._transport.release(abort=False)

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

    @contextmanager
    def agreeing(self, kind: str) -> Iterator[Agree]:
        """Around the making of what all ranks make alike, the n-th of its kind: ``"layer {n}"``. Peers learn of a failure.

        Inside, call what it yields once with a description, and with what the heap must have room for: it returns n, and raises as
        :meth:`Transport.agree <flashmoe_gen.comm.base.Transport.agree>`.
        """
        self._calls.require_open()
        what, begun, asked, agreed = kind.format(n=self._made[kind]), self._calls.begun, False, False

        def agree(description: Mapping[str, Any], needs: HeapNeeds | None = None) -> int:
            nonlocal asked, agreed
            asked = True
            heap = {f"heap.{name}": value for name, value in vars(needs).items()} if needs is not None else {}
            self._transport.agree(what, {**description, **heap}, needs)
            agreed = True
            with self._words.lock:
                self._made[kind] += 1
                return self._made[kind] - 1

        try:
            yield agree
        except BaseException as error:
            if not asked:
                self._transport.agree(what, error)
            elif agreed:  # else all know it
                self._calls.refuse(error, begun)
            raise

    def bind(self, target: Target) -> None:
        """Say where this rank runs.

        Raises:
            CommError: it runs elsewhere already.
        """
        self._transport.bind(target)

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
            raise CommError(
                f"{what} inside a call of the same rank (in a signal handler?). Must wait until the call has ended."
            )

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
        self, target: Target, stream: Any, layer: int, generation: int, launch: Callable[[ctypes.c_uint32 | None], None]
    ) -> None:
        """Begin this rank's next call, of a layer, and run its launch after what the rank launched before on other streams.

        Raises:
            MovedError: see :meth:`flashmoe_gen.comm.calls.Calls.begin`.
            KernelTimeoutError, CommError: the call has ended in failure (synchronous targets).
        """
        target.follow(stream, self.lane.stream)
        if not target.synchronous:
            self._calls.begin(layer, generation, None)
            launch(None)
            self.lane.stream = stream
            return
        flight, words = Launch(), self._words
        self._calls.begin(layer, generation, flight)
        try:
            launch(flight.stop)
        finally:
            words.launches.discard(flight)
            if flight.stop.value and self.world_size == 1 and not words.failure():
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
