"""How much memory a process may still take on this machine."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int | None:
    """Memory that can be used without swapping, within the limits of the containers and of the shell this process runs in.

    ``None`` where Linux is not there to ask.
    """
    machine = _field(_PROC / "meminfo", "MemAvailable:")
    if machine is None:
        return None
    return max(0, min([machine * 1024, *_group_bytes(), *_process_bytes()]))


def _group_bytes() -> Iterator[int]:
    """What each control group that this process is in has left, of either version, from its own up to the root."""
    for folder, version in _groups():
        limit_name, used_name, cache_name = _NAMES[version]
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None:
            # File cache counts as used, but goes when memory is wanted.
            yield limit - used + (_field(folder / "memory.stat", cache_name) or 0)


def _groups() -> Iterator[tuple[Path, int]]:
    """Folders of control groups, and the version of each: 2 has one tree for all, 1 one for memory."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    # In a container its root is mounted here, whatever its name outside.
    for root, version in ((_CGROUP, 2), (_CGROUP / "unified", 2), (_CGROUP / "memory", 1)):
        wanted = "" if version == 2 else "memory"
        paths = [path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
                 if wanted in controllers.split(",")]  # fmt: skip
        for path in ("/", *paths):
            folder = root / path.lstrip("/")
            while folder != root:
                yield folder, version
                folder = folder.parent
            yield root, version


def _process_bytes() -> Iterator[int]:
    """What ``ulimit -v`` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _field(_PROC / "self/statm", None)
    if limit != resource.RLIM_INFINITY and pages is not None:
        yield limit - pages * resource.getpagesize()


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` without the file, or where it says that there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str | None) -> int | None:
    """The number after a name in a file of names and numbers; without a name, the first number."""
    try:
        words = (line.split() for line in path.read_text().splitlines())
        return next((int(line[name is not None]) for line in words if name is None or line[:1] == [name]), None)
    except (OSError, ValueError, IndexError):
        return None
