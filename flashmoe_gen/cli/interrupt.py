"""Ctrl-C: whatever runs, the command reports it and is gone within a second or two."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 1.5  # for the orderly way out


@contextmanager
def answered(leave: Callable[[], None]) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C, and ignore further ones: what cleans up is not interrupted.

    Python raises it between two instructions of the main thread alone, so one that is inside a long call (NVRTC, BLAS, a wait
    for the GPU) would not hear of it: then ``leave`` is called from another thread, after :data:`GRACE_S`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # not ours: a program that calls main(), or a shell that started this in the background
        return
    heard = False
    over = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise KeyboardInterrupt

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGINT:
                if not over.wait(GRACE_S):
                    leave()
                return

    watcher = threading.Thread(target=watch, name="interrupt", daemon=True)
    watcher.start()
    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


def join_workers(seconds: float, others: set[threading.Thread]) -> bool:
    """Wait for the threads beside ``others`` that would keep this process alive; return whether they have all ended."""
    end = time.monotonic() + seconds
    workers = [thread for thread in threading.enumerate() if not thread.daemon and thread not in others]
    for thread in workers:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in workers)
