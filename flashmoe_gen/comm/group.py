"""What the ranks of a communicator share when they live in one process."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .. import env
from ..args import ABORT_RECORD, CONTROL
from ..errors import CommError
from ..launch.target import Memory, Target
from ..layout import HeapLayout, HeapNeeds

_ABORTED_AT = int(CONTROL.dtype.fields["aborted"][1])  # type: ignore[index]


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


def _flags(records: list[np.ndarray[Any, Any]]) -> list[ctypes.c_uint32]:
    """Whether each record is filled, looked at without NumPy, which takes long for one number."""
    assert ABORT_RECORD.fields[0].name == "filled"
    return [ctypes.c_uint32.from_address(record.ctypes.data) for record in records]


class Group:
    """What the in-process ranks of one communicator share. The first layer binds it to a target and makes the heaps."""

    def __init__(self, world_size: int, heap_bytes: int | None) -> None:
        self.world_size = world_size
        self.heap_bytes = heap_bytes
        self.renew_locks()
        self.arrived: set[int] = set()  # ranks that wait in a collective
        self.meetings = 0  # collectives that are over
        self.generation = 0  # counts resets and re-layouts of the heaps
        self.closed = False
        self.target: Target | None = None
        self.records = [ABORT_RECORD.zeros() for _ in range(world_size)]
        self.filled = _flags(self.records)
        self.needs = HeapNeeds()
        self.layout = HeapLayout.of(self.needs, world_size)
        self.heaps: list[Memory] = []
        self.exchange: dict[Any, Any] = {}
        self.layers: weakref.WeakSet[Restarts] = weakref.WeakSet()
        self.made: list[list[Mapping[str, Any]]] = [[] for _ in range(world_size)]  # what describes each rank's layers
        self.attempts = [0] * world_size  # at making layers
        self.unmade: dict[int, tuple[int, str]] = {}  # the attempt at which a rank has not made its next layer, and why
        self.begun = [0] * world_size  # calls of each rank since the signals started from zero
        self.turns: dict[int, tuple[int, Any, int]] = {}  # calls that not all have begun: who was first, of what, how many have
        self.refused: dict[int, str] = {}  # why a rank has not begun its next call
        self.failure = ""  # why nothing works until reset(), beside the records
        self.launches: weakref.WeakSet[Launch] = weakref.WeakSet()
        _groups.add(self)

    def renew_locks(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # something of `made`, `unmade`, `refused`, `failure`, `closed`, `meetings`

    @property
    def running(self) -> bool:
        """Whether a launch is in flight, as far as the host knows."""
        return len(self.launches) > 0

    def bind(self, target: Target) -> None:
        if self.target is None:
            self.target = target
            self.records = [target.record(record) for record in self.records]
            self.filled = _flags(self.records)
        elif (self.target.name, self.target.device) != (target.name, target.device):
            raise CommError(f"The communicator's layers run on {self.target.device}; this one would run on {target.device}.")

    def carve(self, target: Target, needs: HeapNeeds) -> None:
        layout = HeapLayout.of(needs, self.world_size)
        if self.heap_bytes is not None and layout.bytes > self.heap_bytes:
            raise CommError(
                f"heap_bytes={self.heap_bytes} is too small: the layers of this communicator need {layout.bytes} bytes per rank."
            )
        target.synchronize()
        heaps = [target.allocate(layout.bytes) for _ in range(self.world_size)]
        try:
            self.generation += 1  # who reads it now and the pointers before or after this sees another one in begin()
            self.heaps, self.layout, self.needs = heaps, layout, needs
            self.restarted()
        except BaseException:
            self.failure = "the growing of its heap was interrupted."
            raise

    def clear(self) -> None:
        self.failure = "its clearing was interrupted."  # until it is done
        if self.target is not None:
            self.target.synchronize()
        for heap in self.heaps:
            for region in self.layout.regions.values():
                if region.persistent:
                    heap.fill(region.offset, region.bytes, 0)
        for record in self.records:
            record[:] = 0
        self.restarted()
        self.failure = ""

    def restarted(self) -> None:
        """Signals and epochs start from zero: so do the counters of every layer, now and not in the order of some stream."""
        self.generation += 1
        self.begun = [0] * self.world_size
        self.turns.clear()
        self.refused.clear()
        for layer in list(self.layers):
            layer.restart()

    def fail(self, why: str) -> None:
        """End the launches in flight on every rank: nobody shall wait for what cannot come any more."""
        with self.lock:
            self.failure = self.failure or why
            for launch in list(self.launches):
                launch.stop.value = 1
            if self.target is not None:
                self.target.interrupt([heap.pointer + _ABORTED_AT for heap in self.heaps])
            self.changed.notify_all()

    def launch(self) -> Launch:
        """A launch that nobody else waits for. Raises :class:`CommError` when the group has failed."""
        with self.lock:
            self.require_sound()
            made = Launch()
            self.launches.add(made)
            return made

    def begin(self, rank: int, called: Any, generation: int, launch: Launch | None) -> None:
        """Begin a rank's next call, in which every rank must call the same (``called``: layer and placement).

        ``launch`` is what the caller will be in until it has ended; ``None`` where a launch ends by itself.

        Raises:
            MovedError: ``generation`` is over: pack the arguments again.
            CommError: the group has failed, a peer has refused this call or calls something else, or its arguments are wrong.
        """
        with self.lock:
            if self.closed or self.failure:
                self.require_sound()
            if generation != self.generation:
                raise MovedError
            if self.world_size > 1:
                self._join(rank, called)
            if launch is not None:
                self.launches.add(launch)
            self.begun[rank] += 1

    def _join(self, rank: int, called: Any) -> None:
        self.require_peers(rank)
        number = self.begun[rank]
        first, expected, count = self.turns.pop(number, (rank, called, 0))
        if expected != called:
            self.fail(
                f"rank {rank} calls its layer {called[0]} where rank {first} calls its layer {expected[0]}."
                if expected[0] != called[0]
                else f"rank {rank} and rank {first} call their layer {called[0]} with different placements."
            )
            self.require_sound()
        if count + 1 < self.world_size:
            self.turns[number] = (first, expected, count + 1)
        self.refused.pop(rank, None)

    def require_peers(self, rank: int) -> None:
        """Raise if a peer has refused the call that this rank is about to begin."""
        with self.lock:
            for peer, why in self.refused.items():
                if peer != rank and self.begun[peer] <= self.begun[rank]:
                    self.fail(why)
                    self.require_sound()

    def require_sound(self) -> None:
        """Raise what keeps calls from being made, but for the records."""
        if self.closed:
            raise CommError(f"The communicator is closed{': ' + self.failure if self.failure else '.'}")
        if self.failure:
            raise CommError(f"The communicator has failed: {self.failure} Call reset() on every rank.")

    def await_layer(self, rank: int, layer: int) -> None:
        """Wait until every rank has made its n-th layer, and made it alike."""
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        with self.lock:
            while missing := [peer for peer, made in enumerate(self.made) if len(made) <= layer]:
                self.require_sound()
                for peer in missing:
                    attempt, why = self.unmade.get(peer, (0, ""))
                    if why and attempt >= self.attempts[rank]:  # an earlier one has failed here too
                        raise CommError(f"Rank {peer} has not made its layer {layer}: {why}")
                left = deadline - time.monotonic() if timeout else None
                if left is not None and left <= 0:
                    counts = ", ".join(f"rank {peer}: {len(made)}" for peer, made in enumerate(self.made))
                    raise CommError(
                        f"Rank {missing[0]} has not made its layer {layer} within {timeout} s (layers made by {counts}). Every "
                        "rank makes the same layers in the same order, each with its own communicator."
                    )
                self.changed.wait(left)
            for peer, made in enumerate(self.made):
                for name, mine in self.made[rank][layer].items():
                    if made[layer][name] != mine:
                        raise CommError(
                            f"Rank {peer} has made its layer {layer} with {name}={made[layer][name]!r}, rank {rank} with "
                            f"{name}={mine!r}. Every rank makes the same layers in the same order."
                        )

    def meet(self, rank: int, what: str) -> None:
        """Wait until every rank is in this collective. Not a ``threading.Barrier``, which an interrupt leaves unusable."""
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        with self.lock:
            meeting = self.meetings
            self.arrived.add(rank)
            if len(self.arrived) == self.world_size:
                self.arrived.clear()
                self.meetings += 1
                self.changed.notify_all()
            try:
                while self.meetings == meeting:
                    if self.closed:
                        self.require_sound()
                    left = deadline - time.monotonic() if timeout else None
                    if left is not None and left <= 0:
                        raise CommError(f"{what}: not all {self.world_size} ranks came within {timeout} s.")
                    self.changed.wait(left)
            except BaseException:
                if self.meetings == meeting:
                    self.arrived.discard(rank)
                raise

    def after_fork(self) -> None:
        """In the child: threads that held locks or were in calls are not here."""
        self.renew_locks()
        self.arrived.clear()
        if self.running and self.target is not None and self.target.synchronous:
            self.launches.clear()
            self.clear()


_groups: weakref.WeakSet[Group] = weakref.WeakSet()


def _after_fork() -> None:
    for group in list(_groups):
        group.after_fork()


os.register_at_fork(after_in_child=_after_fork)
