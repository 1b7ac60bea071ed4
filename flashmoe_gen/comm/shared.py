"""Memory that the processes of one machine share, how they find it, and how values travel in it.

Stores through a memoryview are plain stores. Where their order matters, :func:`fence` stands between them.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CommError, UnsupportedError

_PAGE = 4096
_NONCE = 16  # bytes at the start of a file: is it the right one?
_kept: list[Any] = []  # stays mapped until the process ends
_barrier = threading.Lock()
_CGROUPS = Path("/sys/fs/cgroup")


def fence() -> None:
    """What this thread stored before is seen by all before what it stores, or reads, afterwards.

    A lock is taken with acquire and given back with release semantics: what comes before the first pair cannot pass its release,
    nor what comes after the second pair its acquire, and a release is seen before a later acquire.
    """
    with _barrier:
        pass
    with _barrier:
        pass


# ---- Processes --------------------------------------------------------------------------------------------------------


def _after_fork() -> None:
    global _barrier
    _barrier = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)


class Process(NamedTuple):
    """A process of this machine.

    Attributes:
        pid: its number, which another one may have later.
        start: when it started, in ticks since the machine did.
    """

    pid: int
    start: int

    @classmethod
    def mine(cls) -> Process:
        """This one."""
        return cls(os.getpid(), int(_stat(os.getpid())[19]))

    def ended(self) -> bool:
        """Whether it is no more; one that nobody has waited for yet counts as ended."""
        try:
            stat = _stat(self.pid)
        except OSError:
            return True
        return stat[0] in ("Z", "X", "x") or int(stat[19]) != self.start


def _stat(pid: int) -> list[str]:
    """State and what follows in /proc/PID/stat: the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


# ---- Memory -----------------------------------------------------------------------------------------------------------


def _available_bytes() -> int:
    """What this machine and the control groups of this process still have. Nothing else limits what is shared in this way: who
    takes more is killed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    rooms = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    group = _CGROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_CGROUPS):
            break
        with suppress(OSError, ValueError, KeyError):  # not of this version, or "max"
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = (
                int((folder / "memory.current").read_text()) - int(stat["file"]) + int(stat["shmem"])
            )  # caches give way
            rooms.append(int((folder / "memory.max").read_text()) - used)
    return min(rooms)


class SharedMemory:
    """Zeroed memory of several processes, at a page boundary; it vanishes with the last of them, whatever way they end.

    Attributes:
        array: it, as uint8.
        handle: for :meth:`open` in another process: of plain integers and strings.
    """

    def __init__(self, descriptor: int, nbytes: int, handle: tuple[int, int, str, int]) -> None:
        # The array holds the mapping, so that it goes with the last of whatever points into it.
        self.array = np.frombuffer(mmap.mmap(descriptor, _PAGE + nbytes), np.uint8)[_PAGE:]
        self.view = memoryview(self.array.data).cast("B")
        self._descriptor, self.handle = descriptor, handle
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def make(cls, nbytes: int) -> SharedMemory:
        """Reserve memory; peers can open it as long as this object lives.

        Raises:
            CommError: there is not that much.
            UnsupportedError: the system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise UnsupportedError("Ranks that are processes need Linux: they share memory through memfd_create.")
        if nbytes > (available := _available_bytes()):
            raise CommError(f"This machine has no {nbytes} bytes of memory left to share, only {available}.")
        descriptor = os.memfd_create("flashmoe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, _PAGE + nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            nonce = os.urandom(_NONCE)
            os.pwrite(descriptor, nonce, 0)
            return cls(descriptor, nbytes, (os.getpid(), descriptor, nonce.hex(), nbytes))
        except OSError as error:
            os.close(descriptor)
            raise CommError(f"This machine cannot share {nbytes} bytes of memory: {error}.") from error

    @classmethod
    def open(cls, handle: Sequence[Any]) -> SharedMemory:
        """The memory of another process of this machine.

        Raises:
            CommError: it cannot be opened, or is not what it was.
        """
        pid, number, nonce, nbytes = handle
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CommError(
                f"The memory of process {pid} cannot be opened ({error}). Are both in one container?"
            ) from error
        try:
            if os.fstat(descriptor).st_size != _PAGE + nbytes or os.pread(descriptor, _NONCE, 0).hex() != nonce:
                raise CommError(f"The memory of process {pid} is that of another one. Are both in one container?")
            return cls(descriptor, nbytes, (pid, number, nonce, nbytes))
        except (CommError, OSError) as error:
            os.close(descriptor)
            if isinstance(error, CommError):
                raise
            raise CommError(f"The memory of process {pid} cannot be mapped: {error}.") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process is. One that ends in there is no more inside. For one thread of a process at a time."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also when an interrupt came between the lock and here

    def keep(self) -> None:
        """Let it stay mapped until the process ends."""
        _kept.append(self.array)


# ---- Values -----------------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Numbers, strings, bytes, ``None``, and tuples, lists and dicts of them."""
    return json.dumps(_plain(value)).encode()


def decode(data: bytes) -> Any:
    """What :func:`encode` was given."""
    return _rich(json.loads(data))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(part)] for key, part in value.items()]}
    raise TypeError(f"{type(value).__name__} cannot go from process to process")


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "tuple":
        return tuple(_rich(part) for part in inner)
    return {_rich(key): _rich(part) for key, part in inner}
