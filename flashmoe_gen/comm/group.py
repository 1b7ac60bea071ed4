"""What the ranks of a communicator share when they live in one process."""

from __future__ import annotations

import ctypes
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


def _flags(records: list[np.ndarray[Any, Any]]) -> list[ctypes.c_uint32]:
    """Whether each record is filled, looked at without NumPy, which takes long for one number."""
    assert ABORT_RECORD.fields[0].name == "filled"
    return [ctypes.c_uint32.from_address(record.ctypes.data) for record in records]


class Group:
    """What the in-process ranks of one communicator share. The first layer binds it to a target and makes the heaps."""

    def __init__(self, world_size: int, heap_bytes: int | None) -> None:
        self.world_size = world_size
        self.heap_bytes = heap_bytes
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # `made`, `unmade`, `refused` or `failure` has
        self.gate = threading.Barrier(world_size)
        self.running = 0  # launches in flight
        self.generation = 0  # counts resets and re-layouts of the heaps
        self.closed = False
        self.target: Target | None = None
        self.records = [ABORT_RECORD.zeros() for _ in range(world_size)]
        self.filled = _flags(self.records)
        self.needs = HeapNeeds()
        self.layout = HeapLayout.of(self.needs, world_size)
        self.heaps: list[Memory] = []
        self.exchange: dict[int, Any] = {}
        self.layers: weakref.WeakSet[Restarts] = weakref.WeakSet()
        self.made: list[list[Mapping[str, Any]]] = [[] for _ in range(world_size)]  # what describes each rank's layers
        self.unmade: dict[int, str] = {}  # why a rank has not made its next layer
        self.begun = [0] * world_size  # calls of each rank since the signals started from zero
        self.refused: dict[int, str] = {}  # why a rank has not begun its next call
        self.failure = ""  # why nothing works until reset(), beside the records
        self.stop = np.zeros(1, np.uint32)  # not 0: launches of a synchronous target end
        self.stops = 0  # how often that was taken back

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
        self.heaps, self.layout, self.needs = [target.allocate(layout.bytes) for _ in range(self.world_size)], layout, needs
        self.restarted()

    def clear(self) -> None:
        if self.target is not None:
            self.target.synchronize()
        for heap in self.heaps:
            for region in self.layout.regions.values():
                if region.persistent:
                    heap.fill(region.offset, region.bytes, 0)
        for record in self.records:
            record[:] = 0
        self.failure = ""
        self.stops += bool(self.stop[0])
        self.stop[0] = 0
        self.restarted()

    def restarted(self) -> None:
        """Signals and epochs start from zero: so do the counters of every layer, now and not in the order of some stream."""
        self.generation += 1
        self.begun = [0] * self.world_size
        self.refused.clear()
        for layer in self.layers:
            layer.restart()

    def fail(self, why: str) -> None:
        """End the calls in flight on every rank: nobody shall wait for what cannot come any more."""
        with self.lock:
            self.failure = self.failure or why
            self.stop[0] = 1
            if self.target is not None:
                self.target.interrupt([heap.pointer + _ABORTED_AT for heap in self.heaps])
            self.changed.notify_all()

    def await_layer(self, rank: int, layer: int) -> None:
        """Wait until every rank has made its n-th layer, and made it alike."""
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        with self.lock:
            while missing := [peer for peer, made in enumerate(self.made) if len(made) <= layer]:
                if self.failure or self.closed:
                    return
                for peer in missing:
                    if why := self.unmade.get(peer):
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

    def wait(self, what: str) -> None:
        timeout = env.timeout_s() or None
        try:
            self.gate.wait(timeout)
        except threading.BrokenBarrierError:
            with self.lock:
                if self.gate.broken:
                    self.gate.reset()
            raise CommError(f"{what}: not all {self.world_size} ranks came within {timeout} s.") from None
