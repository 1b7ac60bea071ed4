"""Communicators of layers that are given none: one rank, shared by the layers of a device that fit the same heap."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress

from ..errors import CommError
from ..launch.target import Target
from ..layout import HeapNeeds
from .communicator import Communicator
from .local import LocalGroup, LocalTransport

_lock = threading.Lock()
_made: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: a thread that held the lock is not here."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def alone(target: Target, needs: HeapNeeds) -> Communicator:
    """One that works, and whose heap these needs fit; else a new one. It lives as long as a layer uses it."""
    with _lock:
        for communicator in _made:
            runs_on = communicator._transport.target
            if runs_on is None or runs_on.device != target.device or needs.fits(communicator.heap.needs):
                continue
            with suppress(CommError):
                communicator.check()
                return communicator
        made = Communicator(LocalTransport(LocalGroup(1, None), 0))
        _made.add(made)
        return made
