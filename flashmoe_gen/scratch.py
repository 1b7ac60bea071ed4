"""The memory beside the heap that a rank's kernels need during a call: one for all layers of a communicator, whose calls follow
each other."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator

from .launch.target import Memory, Target
from .layout import ScratchNeeds

_lock = threading.Lock()  # of all of them: it is held for an allocation


def _after_fork() -> None:
    """In the child: a thread that held the lock is not here."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Scratch:
    """Memory that layers share, made for the needs of one of them.

    Attributes:
        needs: those that fit.
        memory: where it is.
    """

    def __init__(self, needs: ScratchNeeds, memory: Memory) -> None:
        self.needs, self.memory = needs, memory

    def restart(self) -> None:
        """Start from clean counters."""
        for region in self.needs.counters.values():
            self.memory.fill(region.offset, region.bytes, 0)


class Scratches:
    """What the layers of one rank's communicator share. Each lives as long as a layer uses it, and never moves.

    A layer that does not fit any gets one of its own, which later layers then share: the largest layer had best come first.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakSet[Scratch] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Scratch]:
        with _lock:
            return iter(list(self._made))

    def get(self, needs: ScratchNeeds, target: Target) -> Scratch:
        """The smallest that serves these needs, zeroed when made.

        Raises:
            CommError: no memory.
        """
        with _lock:
            there = [scratch for scratch in self._made if needs.fits(scratch.needs)]
            if there:
                return min(there, key=lambda scratch: scratch.needs.bytes)
            made = Scratch(needs, target.allocate(needs.bytes))
            self._made.add(made)
            return made

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(scratch.needs.bytes for scratch in self)

    def restart(self) -> None:
        """Start from clean counters: for the communicator, also where the layer that used them last is gone."""
        for scratch in self:
            scratch.restart()
