"""What connects the ranks of a communicator: everything that :class:`Communicator` asks of a transport."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..args import ABORT_RECORD, CONTROL
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds

T = TypeVar("T")

ABORTED_AT = int(CONTROL.dtype.fields["aborted"][1])  # type: ignore[index]


class Restarts(Protocol):
    """What a communicator asks of its layers, and of the scratch that they share."""

    def restart(self) -> None:
        """Clear all counters."""


class Launch:
    """One launch in flight, as long as somebody holds this object: an interrupt may come before any ``finally``.

    Attributes:
        stop: not 0: a synchronous target ends the launch early.
    """

    __slots__ = ("__weakref__", "stop")

    def __init__(self) -> None:
        self.stop = ctypes.c_uint32()


class MovedError(Exception):
    """The heap is no longer where the arguments of a call say."""


class Lane:
    """The order of one rank's launches, across its communicators.

    Attributes:
        stream: of the last launch; ``None``: there was none, or the target has no streams.
    """

    __slots__ = ("stream",)

    def __init__(self) -> None:
        self.stream: Any = None


class Heaps(Protocol):
    """The symmetric heap of each rank of a group, as this rank sees them. Made collectively; addresses never move.

    Attributes:
        pointers: where each rank's heap starts, as kernels of this rank see it.
        mine: this rank's, zeroed when made.
    """

    pointers: list[int]
    mine: Memory

    def interrupt(self, at: int) -> None:
        """Set the u32 at this byte offset to 1 in every rank's heap, while kernels run. Never waits for them."""

    def release(self, *, abort: bool) -> None:
        """Give the memory back. ``abort``: keep everything mapped that peers may still store into, and wait for nobody."""


class HeapSource(Protocol):
    """Where heaps come from: memory that processes share, or NVSHMEM.

    Attributes:
        collective: whether all ranks give heaps back together.
    """

    collective: bool

    def allocate(self, nbytes: int) -> Heaps:
        """Collective over the members of this source. Raises :class:`~flashmoe_gen.CommError` when there is no memory."""

    def part(self, members: Sequence[int], exchange: Callable[[Any], list[Any]]) -> HeapSource:
        """Collective: for a group of some members, in that order; ``exchange`` is collective among them."""

    def close(self, *, abort: bool) -> None:
        """Give everything back; see :meth:`Heaps.release`."""


class Standing(Protocol):
    """What one rank tells the others outside collectives: only that rank writes it, everybody may read it at any time.

    Attributes:
        begun: calls it has begun since the signals started from zero.
        refused: why it has not begun its next call; ``""``: it has not refused it.
    """

    @property
    def begun(self) -> int: ...

    refused: str

    def begin(self, layer: int) -> None:
        """Its next call is one of this layer."""

    def called(self, number: int) -> int | None:
        """The layer of its call with this number; ``None``: not begun, or long ago."""

    def clear(self) -> None:
        """The signals start from zero."""


class Words:
    """What this process knows of all ranks; every call looks at it, so reading costs next to nothing.

    A rank's stores are seen in their order, and before what it reads afterwards (sequentially consistent): of two ranks that
    each store and then look at the other's word, at least one sees the other's. A rank that begins a call stores ``begun``
    and then looks for a refusal; one that refuses a call stores ``refused`` and then looks at ``begun``.

    Attributes:
        lock: excludes the other threads of this process, re-entrantly; after a fork another one. Held while words change or
            must not, never while a kernel runs or a peer is waited for.
        closed: no rank of this process may use the communicator any more.
        called: some call has begun here: from then on the heap stays where it is.
        generation: changes whenever signals and epochs start from zero, maybe in other memory.
        standings: of each rank.
        records: the abort records (``AbortRecord[1]``) of the ranks of this process.
        filled: whether each of them is filled.
        launches: in flight in this process, as far as the host knows.
    """

    def __init__(self, ranks_here: int) -> None:
        self.lock = threading.RLock()
        self.closed = False
        self.called = False
        self.generation = 0
        self.standings: Sequence[Standing] = ()
        self.records = [ABORT_RECORD.zeros() for _ in range(ranks_here)]
        self.filled = [ctypes.c_uint32() for _ in range(ranks_here)]
        for place, record in enumerate(self.records):
            self.keep_record(place, record)
        self.launches: weakref.WeakSet[Launch] = weakref.WeakSet()

    def keep_record(self, place: int, record: np.ndarray[Any, Any]) -> None:
        """Use another abort record for the rank at this place among those of this process."""
        assert ABORT_RECORD.fields[0].name == "filled"
        self.records[place] = record
        self.filled[place] = ctypes.c_uint32.from_address(record.ctypes.data)  # NumPy takes long for one number

    def failure(self) -> str:
        """Why nothing works until reset(), beside the abort records; ``""``: it works. Set by :meth:`Transport.fail`."""
        raise NotImplementedError

    def departed(self) -> str:
        """Which rank of another process has closed its end or is no more, so that no call can be made; ``""``: none has."""
        return ""

    def refusing(self) -> Iterator[Standing]:
        """The standings of ranks that refuse their next call."""
        return (standing for standing in self.standings if standing.refused)


class Transport(Protocol):
    """One rank's end of what connects the ranks: threads of a process, or processes that share memory.

    Collective means: every rank calls it, in the same order; it raises :class:`~flashmoe_gen.CommError` when the communicator
    is closed meanwhile, or a rank does not come within ``FLASHMOE_TIMEOUT_S``, which it names. The caller does not hold
    ``words.lock``. Everything else may be called at any time by any thread of this rank.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
        node: number of its machine.
        ranks_here: ranks in this process, ascending.
        sharing: how many ranks share the processor this rank runs on.
        device: number of the GPU this rank must run on; ``None``: any, or the host.
        words: what is known of all ranks; the same object for all ranks of a process.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    ranks_here: tuple[int, ...]
    sharing: int
    device: int | None
    words: Words

    # Memory ----------------------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target | None:
        """Where this rank runs, or another one of this process when this one has no target yet; ``None``: none has."""

    @property
    def layout(self) -> HeapLayout:
        """Of the heap of each rank; offsets in bytes."""

    @property
    def record(self) -> np.ndarray[Any, Any]:
        """The abort record (``AbortRecord[1]``) that kernels of this rank fill and this process reads at any time."""

    @property
    def pointers(self) -> list[int]:
        """Where each rank's heap starts, as kernels of this rank see it; empty while there is none."""

    def heap(self, rank: int) -> Memory:
        """The heap of a rank of this process."""

    def bind(self, target: Target) -> None:
        """Say where this rank runs.

        Raises:
            CommError: it already runs elsewhere, or the target cannot reach the memory of another rank's.
        """

    def attach(self, layer: Restarts) -> None:
        """From now on, and as long as it lives, a layer's counters start from zero whenever the signals do."""

    def clear(self) -> None:
        """Zero the signals and abort records of the ranks of this process, restart its layers, and forget its failure and what
        its standings say. No call may be in flight on any rank."""

    # Collectives -----------------------------------------------------------------------------------------------------

    def exchange(self, value: T, what: str) -> list[T]:
        """Collective: every rank's value, in rank order: integers, strings, ``None`` or tuples of them.

        ``what`` is the name of the public method in error messages. But for ``"reset()"`` it raises when the communicator fails.
        """

    def agree(self, what: str, value: Mapping[str, Any] | BaseException, needs: HeapNeeds | None = None) -> None:
        """Say what this rank is about to make, or why it cannot: names, and numbers, strings, ``None`` or tuples of them.

        Processes wait for each other here, however long one compiles, and raise on all ranks when two of them disagree or one
        cannot. Ranks of one process may all be used by one thread: whoever comes later compares with those that were here.

        Args:
            what: the same words on all ranks: ``"layer 3"``.
            value: what it makes, or the reason.
            needs: what the heaps must have room for then, beside what they are laid out for. Heaps that this moves are zeroed, and
                ``words.generation`` changes; after the first call nothing moves.

        Raises:
            CommError: names the field, the values and the ranks, or the rank that cannot and why; or there is no memory, or the
                heap would have to move. Not when ``value`` is a reason.
        """

    def await_agreement(self, what: str) -> None:
        """Wait for the ranks that have not said this yet; raises as :meth:`agree`."""

    def split(self, members: Sequence[int]) -> Transport:
        """Collective: this rank's end of a transport among ``members``, in that order, with heaps of its own. Each rank
        passes the members it is one of."""

    # What ranks tell each other outside collectives ------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """End the launches in flight on every rank: nobody shall wait for what cannot come any more. A rank's first reason
        stays, and the earliest is what all ranks raise. Never waits for another rank."""

    def ended(self) -> list[int]:
        """Ranks whose process is no more."""

    def depart(self) -> None:
        """Set ``words.closed`` and tell whoever waits. A peer that begins a call afterwards sees it."""

    def release(self, *, abort: bool) -> None:
        """Give the heap back after :meth:`depart`, together where its memory asks for that, at most for ``FLASHMOE_TIMEOUT_S``;
        ``abort``: as :meth:`Heaps.release`."""
