"""A lock between processes that only saves work: where locks do not work, its holder goes on without one."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import trust

logger = logging.getLogger("flashmoe_gen")

_POLL_S = 0.05


@contextmanager
def held(path: Path, *, wait_s: float, what: str) -> Iterator[bool]:
    """Hold the lock of a file, which is made; yields whether it is held.

    The lock is one of the operating system (``flock``), so that a killed holder releases it, and threads of one process
    exclude each other too. It is not held when the file system has no locks (NFS without its lock daemon), the file
    cannot be made or opened, or another process holds it for longer than ``wait_s``.

    Args:
        path: the lock's file; stays when the lock is released.
        wait_s: longest wait for another holder, in seconds.
        what: named in the log while waiting.
    """
    try:
        file = _open(path)
    except OSError as error:
        logger.debug("going on without the lock %s: %s", path, error)
        yield False
        return
    try:
        yield _acquire(file, path, wait_s, what)
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked child may have the file open too
        os.close(file)


def _open(path: Path) -> int:
    trust.make_folder(path.parent)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        pass
    else:
        with suppress(OSError):  # who may write to the folder may lock
            os.fchmod(file, 0o644 | path.parent.stat().st_mode & stat.S_IWGRP)
        return file
    try:
        return os.open(path, flags)
    except PermissionError:  # another user's file; most file systems lock what is open for reading too
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _acquire(file: int, path: Path, wait_s: float, what: str) -> bool:
    deadline = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            logger.debug("going on without the lock %s: %s", path, error)
            return False
        if deadline is None:
            logger.info("waiting for another process that compiles %s", what)
            deadline = time.monotonic() + wait_s
        elif time.monotonic() > deadline:
            logger.warning("another process holds %s for more than %.0f s; going on", path, wait_s)
            return False
        time.sleep(_POLL_S)
