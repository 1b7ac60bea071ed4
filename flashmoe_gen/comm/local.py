"""Ranks that are threads of one process: they share this process's objects, and one lock."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from .. import env
from ..args import ABORT_RECORD, CONTROL
from ..errors import CommError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds
from .base import Called, Restarts, Words
from .calls import require_sound

T = TypeVar("T")

_ABORTED_AT = int(CONTROL.dtype.fields["aborted"][1])  # type: ignore[index]


def _flag(record: np.ndarray[Any, Any]) -> ctypes.c_uint32:
    """Whether a record is filled, looked at without NumPy, which takes long for one number."""
    assert ABORT_RECORD.fields[0].name == "filled"
    return ctypes.c_uint32.from_address(record.ctypes.data)


class LocalGroup:
    """What the ranks share. Heaps are made by the first layer of any of them.

    Args:
        world_size: number of ranks.
        heap_bytes: limit of one rank's heap; ``None``: none.
    """

    def __init__(self, world_size: int, heap_bytes: int | None) -> None:
        self.world_size = world_size
        self.heap_bytes = heap_bytes
        self.words = Words(world_size)
        self.changed = threading.Condition(self.words.lock)
        self.arrived: dict[int, Any] = {}  # ranks that wait in a collective, and what they bring
        self.brought: list[Any] = []  # to the last collective that is over
        self.meetings = 0  # collectives that are over
        self.targets: list[Target | None] = [None] * world_size
        self.records = [ABORT_RECORD.zeros() for _ in range(world_size)]
        self.words.filled = [_flag(record) for record in self.records]
        self.needs = HeapNeeds()
        self.layout = HeapLayout.of(self.needs, world_size)
        self.heaps: list[Memory] = []
        self.owners: list[Target] = []  # of the heaps
        self.layers: weakref.WeakSet[Restarts] = weakref.WeakSet()
        self.turns: dict[int, tuple[int, Called, int]] = {}  # calls that not all have begun: first rank, its call, how many have
        _groups.add(self)

    @property
    def bound(self) -> list[Target]:
        return [target for target in self.targets if target is not None]

    def carve(self, needs: HeapNeeds) -> None:
        """Allocate all heaps anew, each with the target of its rank, or with any while that is not known."""
        layout = HeapLayout.of(needs, self.world_size)
        if self.heap_bytes is not None and layout.bytes > self.heap_bytes:
            raise CommError(
                f"heap_bytes={self.heap_bytes} is too small: the layers of this communicator need {layout.bytes} bytes per rank."
            )
        for target in self.bound:
            target.synchronize()
        owners = [target or self.bound[0] for target in self.targets]
        heaps = [owner.allocate(layout.bytes) for owner in owners]
        try:
            self.words.generation += 1  # who reads it now and the pointers before or after this sees another one in begin()
            self.heaps, self.owners, self.layout, self.needs = heaps, owners, layout, needs
            self.restarted()
        except BaseException:
            self.words.failure = "the growing of its heap was interrupted."
            raise

    def clear(self) -> None:
        self.words.failure = "its clearing was interrupted."  # until it is done
        for target in self.bound:
            target.synchronize()
        for heap in self.heaps:
            for region in self.layout.regions.values():
                if region.persistent:
                    heap.fill(region.offset, region.bytes, 0)
        for record in self.records:
            record[:] = 0
        self.restarted()
        self.words.failure = ""

    def restarted(self) -> None:
        """Signals and epochs start from zero: so do the counters of every layer, now and not in the order of some stream."""
        self.words.generation += 1
        for standing in self.words.standings:
            standing.begun, standing.refused = 0, ""
        self.turns.clear()
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

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self._group = group
        self.rank = self.local_rank = rank
        self.world_size = group.world_size
        self.ranks_here = tuple(range(group.world_size))
        self.words = group.words

    @property
    def target(self) -> Target | None:
        return self._group.targets[self.rank] or next(iter(self._group.bound), None)

    @property
    def layout(self) -> HeapLayout:
        return self._group.layout

    @property
    def record(self) -> np.ndarray[Any, Any]:
        return self._group.records[self.rank]

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
                    raise CommError(f"The communicator's layers run on {mine.device}; this one would run on {target.device}.")
                return
            for other in group.bound:
                if why := target.reaches(other) or other.reaches(target):
                    raise CommError(why)
            record = target.record(group.records[rank])
            group.records[rank], group.words.filled[rank] = record, _flag(record)
            group.targets[rank] = target

    def reserve(self, needs: HeapNeeds) -> None:
        group = self._group
        with self.words.lock:
            union, target = group.needs.union(needs), group.targets[self.rank]
            assert target is not None
            at_home = bool(group.heaps) and group.owners[self.rank].device == target.device
            if union == group.needs and at_home:
                return
            if self.words.launches:
                raise CommError("The heap cannot grow while a call is in flight. Make all layers before the first call.")
            group.carve(union)

    def attach(self, layer: Restarts) -> None:
        with self.words.lock:
            self._group.layers.add(layer)

    def clear(self) -> None:
        with self.words.lock:
            self._group.clear()

    def exchange(self, value: T, what: str) -> list[T]:
        """Not a ``threading.Barrier``, which an interrupt leaves unusable."""
        group = self._group
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        with self.words.lock:
            meeting = group.meetings
            group.arrived[self.rank] = value
            if len(group.arrived) == self.world_size:
                group.brought = [group.arrived[rank] for rank in range(self.world_size)]
                group.arrived.clear()
                group.meetings += 1
                group.changed.notify_all()
            try:
                while group.meetings == meeting:
                    if self.words.closed:
                        require_sound(self.words)
                    left = deadline - time.monotonic() if timeout else None
                    if left is not None and left <= 0:
                        raise CommError(f"{what}: not all {self.world_size} ranks came within {timeout} s.")
                    group.changed.wait(left)
            except BaseException:
                if group.meetings == meeting:
                    group.arrived.pop(self.rank, None)
                raise
            return list(group.brought)  # the next collective needs this rank, so it is not over yet

    def split(self, members: Sequence[int]) -> LocalTransport:
        made = LocalGroup(len(members), self._group.heap_bytes) if self.rank == members[0] else None
        group = self.exchange(made, "split()")[members[0]]
        assert group is not None
        return LocalTransport(group, members.index(self.rank))

    def tell(self) -> None:
        with self.words.lock:
            self._group.changed.notify_all()

    def wait(self, seconds: float | None) -> None:
        self._group.changed.wait(seconds)

    def first_call(self, number: int, called: Called) -> tuple[int, Called]:
        turns = self._group.turns
        with self.words.lock:
            first, expected, count = turns.pop(number, (self.rank, called, 0))
            if count + 1 < self.world_size:
                turns[number] = first, expected, count + 1
            return first, expected

    def begun_call(self, number: int) -> Called | None:
        turn = self._group.turns.get(number)
        return None if turn is None else turn[1]

    def fail(self, why: str) -> None:
        group, words = self._group, self.words
        with words.lock:
            words.failure = words.failure or why
            for launch in list(words.launches):
                launch.stop.value = 1
            for owner, heap in zip(group.owners, group.heaps):
                owner.interrupt([heap.pointer + _ABORTED_AT])
            group.changed.notify_all()

    def close(self) -> None:
        with self.words.lock:
            self.words.closed = True
            self._group.changed.notify_all()


_groups: weakref.WeakSet[LocalGroup] = weakref.WeakSet()


def _after_fork() -> None:
    for group in list(_groups):
        group.after_fork()


os.register_at_fork(after_in_child=_after_fork)
