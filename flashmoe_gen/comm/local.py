"""Ranks that are threads of one process: they share this process's objects, and one lock."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .. import env
from ..errors import CommError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from .agreement import cannot, clear, disagreement, laid_out, no_longer_fits
from .base import ABORTED_AT, Restarts, Words
from .calls import reason, require_sound

T = TypeVar("T")

_RECENT = 1024  # calls that a standing knows the layers of


class LocalStanding:
    """See :class:`~flashmoe_gen.comm.base.Standing`."""

    __slots__ = ("_layers", "begun", "refused")

    def __init__(self) -> None:
        self.clear()

    def begin(self, layer: int) -> None:
        self._layers[self.begun] = layer
        self._layers.pop(self.begun - _RECENT, None)
        self.begun += 1

    def called(self, number: int) -> int | None:
        return self._layers.get(number)

    def clear(self) -> None:
        self.begun, self.refused = 0, ""
        self._layers: dict[int, int] = {}


class LocalWords(Words):
    """See :class:`~flashmoe_gen.comm.base.Words`.

    Attributes:
        why: what :meth:`failure` says.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.standings = [LocalStanding() for _ in range(world_size)]
        self.why = ""

    def failure(self) -> str:
        return self.why


class _Said(NamedTuple):
    """What a rank has said of something that all make: at which attempt, and why it cannot make it."""

    attempt: int
    values: Mapping[str, Any] | None
    why: str


class LocalGroup:
    """What the ranks share. Heaps are made by the first layer of any of them.

    Args:
        world_size: number of ranks.
        heap_bytes: size of one rank's heap; ``None``: what its layers need.
        devices: the GPU of each rank; ``None``: any, one for all.
        sharing: how many ranks share the processor of each, those of other groups included; ``None``: this group has it alone.
    """

    def __init__(
        self,
        world_size: int,
        heap_bytes: int | None,
        devices: Sequence[int] | None = None,
        sharing: Sequence[int] | None = None,
    ) -> None:
        self.world_size = world_size
        self.heap_bytes = heap_bytes
        self.devices: list[int | None] = [None] * world_size if devices is None else list(devices)
        self.sharing = [self.devices.count(device) for device in self.devices] if sharing is None else list(sharing)
        self.words = LocalWords(world_size)
        self.changed = threading.Condition(self.words.lock)
        self.arrived: dict[int, Any] = {}  # ranks that wait in a collective, and what they bring
        self.brought: list[Any] = []  # to the last collective that is over
        self.meetings = 0  # collectives that are over
        self.said: dict[str, dict[int, _Said]] = {}
        self.targets: list[Target | None] = [None] * world_size
        self.asked = HeapNeeds()
        self.layout = HeapLayout.of(self.asked, world_size)
        self.heaps: list[Memory] = []
        self.owners: list[Target] = []  # of the heaps
        self.layers: weakref.WeakSet[Restarts] = weakref.WeakSet()
        _groups.add(self)

    @property
    def bound(self) -> list[Target]:
        return [target for target in self.targets if target is not None]

    def carve(self, asked: HeapNeeds) -> None:
        """Allocate all heaps anew, each with the target of its rank, or with any while that is not known."""
        layout = laid_out(asked, self.world_size, self.heap_bytes)
        for target in self.bound:
            target.synchronize()
        owners = [target or self.bound[0] for target in self.targets]
        heaps = [owner.allocate(layout.bytes) for owner in owners]
        try:
            # Who reads it now, and the pointers before or after this, sees another one in begin().
            self.words.generation += 1
            self.heaps, self.owners, self.layout, self.asked = heaps, owners, layout, asked
            self.restarted()
        except BaseException:
            self.words.why = "the growing of its heap was interrupted."
            raise

    def clear(self) -> None:
        self.words.why = "its clearing was interrupted."  # until it is done
        for target in self.bound:
            target.synchronize()
        for heap in self.heaps:
            clear(heap, self.layout)
        for record in self.words.records:
            record[:] = 0
        self.restarted()
        self.words.why = ""

    def restarted(self) -> None:
        """Signals and epochs start from zero: so do the counters of every layer, now and not in the order of some stream."""
        self.words.generation += 1
        for standing in self.words.standings:
            standing.clear()
        for layer in list(self.layers):
            layer.restart()

    def after_fork(self) -> None:
        """In the child: threads that held locks or were in calls are not here."""
        words = self.words
        words.lock = threading.RLock()
        self.changed = threading.Condition(words.lock)
        self.arrived.clear()
        if words.launches and all(target.synchronous for target in self.bound):
            words.launches.clear()
            self.clear()


class LocalTransport:
    """One rank's end of a :class:`LocalGroup`; see :class:`~flashmoe_gen.comm.base.Transport`."""

    node = 0

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self._group = group
        self.rank = self.local_rank = rank
        self.world_size = group.world_size
        self.ranks_here = tuple(range(group.world_size))
        self.device = group.devices[rank]
        self.sharing = group.sharing[rank]
        self.words: Words = group.words

    @property
    def target(self) -> Target | None:
        return self._group.targets[self.rank] or next(iter(self._group.bound), None)

    @property
    def layout(self) -> HeapLayout:
        return self._group.layout

    @property
    def record(self) -> np.ndarray[Any, Any]:
        return self.words.records[self.rank]

    @property
    def pointers(self) -> list[int]:
        return [heap.pointer for heap in self._group.heaps]

    def heap(self, rank: int) -> Memory:
        return self._group.heaps[rank]

    def bind(self, target: Target) -> None:
        group, rank = self._group, self.rank
        with self.words.lock:
            mine = group.targets[rank]
            if mine is not None:
                if (mine.name, mine.device) != (target.name, target.device):
                    raise CommError(
                        f"The communicator's layers run on {mine.device}; this one would run on {target.device}."
                    )
                return
            for other in group.bound:
                if why := target.reaches(other) or other.reaches(target):
                    raise CommError(why)
            self.words.keep_record(rank, target.record(self.record))
            group.targets[rank] = target

    def _fit(self, needs: HeapNeeds) -> None:
        group = self._group
        target = group.targets[self.rank]
        short = bool(needs.fits(group.layout.needs))
        if self.words.called:
            if short:
                raise no_longer_fits(group.layout, needs)
        elif target is None:  # reserve() before there is a layer: the first one says where
            asked = group.asked.union(needs)
            laid_out(asked, self.world_size, group.heap_bytes)
            group.asked = asked
        elif short or not group.heaps or group.owners[self.rank].device != target.device:
            group.carve(group.asked.union(needs))

    def attach(self, layer: Restarts) -> None:
        with self.words.lock:
            self._group.layers.add(layer)

    def clear(self) -> None:
        with self.words.lock:
            self._group.clear()

    # Collectives -----------------------------------------------------------------------------------------------------

    def exchange(self, value: T, what: str) -> list[T]:
        """Not a ``threading.Barrier``, which an interrupt leaves unusable."""
        group = self._group
        with self.words.lock:
            meeting = group.meetings
            group.arrived[self.rank] = value
            if len(group.arrived) == self.world_size:
                group.brought = [group.arrived[rank] for rank in range(self.world_size)]
                group.arrived.clear()
                group.meetings += 1
                group.changed.notify_all()
            try:
                self._wait(lambda: [] if group.meetings > meeting else self._not_in(group.arrived), what)
            except BaseException:
                if group.meetings == meeting:
                    group.arrived.pop(self.rank, None)
                raise
            return list(group.brought)  # the next collective needs this rank, so it is not over yet

    def _not_in(self, here: Mapping[int, Any]) -> list[int]:
        return [rank for rank in self.ranks_here if rank not in here]

    def _wait(self, missing: Callable[[], list[int]], what: str, *, advice: str = "") -> None:
        """Wait until no rank is missing. The caller holds the lock, which others can take meanwhile."""
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        while late := missing():
            if self.words.closed:
                require_sound(self.words)
            left = deadline - time.monotonic() if timeout else None
            if left is not None and left <= 0:
                ranks = ", ".join(map(str, late))
                raise CommError(f"{what}: rank{'s' * (len(late) > 1)} {ranks} did not come within {timeout} s.{advice}")
            self._group.changed.wait(left)

    def agree(self, what: str, value: Mapping[str, Any] | BaseException, needs: HeapNeeds | None = None) -> None:
        with self.words.lock:
            here = self._group.said.setdefault(what, {})
            attempt = here[self.rank].attempt + 1 if self.rank in here else 1

            def say(said: Mapping[str, Any] | None, why: str) -> None:
                here[self.rank] = _Said(attempt, said, why)
                self._group.changed.notify_all()

            if isinstance(value, BaseException):
                return say(None, cannot(self.rank, what, reason(value)))
            try:
                values = {rank: said.values for rank, said in here.items()} | {self.rank: value}
                if why := disagreement(what, values):
                    raise CommError(why)
                if needs is not None:
                    self._fit(needs)
            except BaseException as error:
                say(None, cannot(self.rank, what, reason(error)))
                raise
            say(value, "")

    def await_agreement(self, what: str) -> None:
        here = self._group.said.setdefault(what, {})
        mine = here[self.rank]

        def missing() -> list[int]:
            require_sound(self.words)
            late = [rank for rank in self.ranks_here if rank not in here or here[rank].values is None]
            for rank in late:
                if rank in here and here[rank].attempt >= mine.attempt:  # an earlier attempt has failed here too
                    raise CommError(here[rank].why)
            return late

        advice = " Every rank makes the same layers in the same order, each with its own communicator."
        with self.words.lock:
            self._wait(missing, f"The making of {what}", advice=advice)

    def split(self, members: Sequence[int]) -> LocalTransport:
        parent = self._group
        devices = None if self.device is None else [parent.devices[member] or 0 for member in members]
        sharing = [parent.sharing[member] for member in members]  # the other parts are there too, and run at the same time
        made = LocalGroup(len(members), parent.heap_bytes, devices, sharing) if self.rank == members[0] else None
        group = self.exchange(made, "split()")[members[0]]
        assert group is not None
        return LocalTransport(group, members.index(self.rank))

    # What ranks tell each other outside collectives ------------------------------------------------------------------

    def fail(self, why: str) -> None:
        group, words = self._group, self.words
        with words.lock:
            group.words.why = group.words.why or why
            for launch in list(words.launches):
                launch.stop.value = 1
            for owner, heap in zip(group.owners, group.heaps):
                owner.interrupt([heap.pointer + ABORTED_AT])
            group.changed.notify_all()

    def ended(self) -> list[int]:
        return []

    def depart(self) -> None:
        with self.words.lock:
            self.words.closed = True
            self._group.changed.notify_all()

    def release(self, *, abort: bool) -> None:
        pass  # memory stays as long as somebody uses it


_groups: weakref.WeakSet[LocalGroup] = weakref.WeakSet()


def _after_fork() -> None:
    for group in list(_groups):
        group.after_fork()


os.register_at_fork(after_in_child=_after_fork)
