"""What connects the ranks of a communicator: everything that :class:`Communicator` asks of a transport."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds

T = TypeVar("T")
Called = tuple[int, int]  # a call: the number of its layer, and a tag of its placement


class Restarts(Protocol):
    """What a communicator asks of a layer."""

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


class Standing:
    """What one rank tells the others outside collectives: only that rank writes it (and ``clear()``), everybody may read it.

    Attributes:
        begun: calls it has begun since the signals started from zero.
        refused: why it has not begun its next call; ``""``: it has not refused it.
        made: what describes each layer it has made, in order: names, and integers, floats, strings, ``None`` or tuples of them.
        attempts: at making layers.
        unmade: the attempt at which it has not made its next layer, and why; ``(0, "")``: none.
    """

    __slots__ = ("attempts", "begun", "made", "refused", "unmade")

    def __init__(self) -> None:
        self.begun = 0
        self.refused = ""
        self.made: list[Mapping[str, Any]] = []
        self.attempts = 0
        self.unmade = (0, "")


class Words:
    """What this process knows of all ranks; every call looks at it, so these are plain attributes where they can be.

    A rank's stores are seen in their order, and before what it reads afterwards (sequentially consistent): of two ranks that
    each store and then look at the other's word, at least one sees the other's. A rank that begins a call stores ``begun``
    and then looks for a refusal; one that refuses a call stores ``refused`` and then looks at ``begun``.

    Attributes:
        lock: excludes the other threads of this process, re-entrantly; after a fork another one. Held while words change or
            must not, never while a kernel runs.
        closed: no rank of this process may use the communicator any more.
        failure: why nothing works until reset(), beside the abort records; ``""``: it works. Set by :meth:`Transport.fail`.
        generation: changes whenever signals and epochs start from zero, maybe in other memory.
        standings: of each rank.
        filled: whether each rank's abort record is filled.
        launches: in flight in this process, as far as the host knows.
    """

    def __init__(self, world_size: int) -> None:
        self.lock = threading.RLock()
        self.closed = False
        self.failure = ""
        self.generation = 0
        self.standings: Sequence[Standing] = [Standing() for _ in range(world_size)]
        self.filled: list[ctypes.c_uint32] = []
        self.launches: weakref.WeakSet[Launch] = weakref.WeakSet()


class Transport(Protocol):
    """One rank's end of what connects the ranks: threads of a process, or processes that share memory.

    Collective means: every rank calls it, in the same order; it raises :class:`~flashmoe_gen.CommError` when the communicator
    is closed meanwhile, or a rank does not come within ``FLASHMOE_TIMEOUT_S``. Everything else may be called at any time by
    any thread of this rank. Two operations must be atomic among all ranks: :meth:`fail` and :meth:`first_call`, whose first
    writer wins. The rest needs no more than ``words.lock`` and the order of stores that :class:`Words` asks for.

    Attributes:
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks.
        local_rank: this rank among those of its machine.
        ranks_here: ranks in this process, ascending.
        words: what is known of all ranks; the same object for all ranks of a process.
    """

    rank: int
    world_size: int
    local_rank: int
    ranks_here: tuple[int, ...]
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
        """Where each rank's heap starts, as kernels of this rank see it; empty before :meth:`reserve`."""

    def heap(self, rank: int) -> Memory:
        """The heap of a rank of this process, zeroed when made."""

    def bind(self, target: Target) -> None:
        """Say where this rank runs.

        Raises:
            CommError: it already runs elsewhere, or the target cannot reach the memory of another rank's.
        """

    def reserve(self, needs: HeapNeeds) -> None:
        """Make all heaps large enough for ``needs`` beside what they hold, after :meth:`bind`. Not collective, as ranks make
        their layers one after the other; every heap it moves is zeroed, and ``words.generation`` changes.

        Raises:
            CommError: no memory, over the limit, or a launch is in flight and the heaps would have to move.
        """

    def attach(self, layer: Restarts) -> None:
        """From now on, and as long as it lives, a layer's counters start from zero whenever the signals do."""

    def clear(self) -> None:
        """Zero the signals and abort records of the ranks of this process, restart its layers, and forget the failure and what
        the standings say of calls. No call that peers wait for may be in flight on any rank."""

    # Collectives -----------------------------------------------------------------------------------------------------

    def exchange(self, value: T, what: str) -> list[T]:
        """Collective: every rank's value, in rank order: integers, strings, ``None`` or tuples of them.

        ``what`` is the name of the public method in error messages.
        """

    def split(self, members: Sequence[int]) -> Transport:
        """Collective: this rank's end of a transport among ``members``, in that order, with heaps of its own. Each rank
        passes the members it is one of."""

    # What ranks tell each other outside collectives ------------------------------------------------------------------

    def tell(self) -> None:
        """Let the others know, at once, that a word of this rank has changed."""

    def wait(self, seconds: float | None) -> None:
        """Wait until somebody tells something, at most so long (``None``: no limit); may return early. The caller holds
        ``words.lock``, which others can take meanwhile."""

    def first_call(self, number: int, called: Called) -> tuple[int, Called]:
        """Who began call ``number`` (of those since the signals started from zero) first, and what that rank called: the
        caller, unless another rank was first. Atomic. Each rank asks once per call; asked by all, it is forgotten."""

    def begun_call(self, number: int) -> Called | None:
        """What the first rank called in call ``number``; ``None``: nobody has begun it, or all have."""

    def fail(self, why: str) -> None:
        """End the launches in flight on every rank: nobody shall wait for what cannot come any more. Atomic: the first
        reason stays. Never waits for another rank."""

    def close(self) -> None:
        """Set ``words.closed`` and wake whoever waits; memory stays as long as somebody uses it."""
