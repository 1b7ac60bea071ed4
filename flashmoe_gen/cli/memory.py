"""How much memory a process may still take on this machine."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be used without swapping, within the limit of a container; ``None`` where Linux is not there to ask."""
    machine = _field(Path("/proc/meminfo"), "MemAvailable:")
    if machine is None:
        return None
    return min(machine * 1024, _container_bytes(machine * 1024))


def _container_bytes(machine: int) -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return machine
    if limit == "max":
        return machine
    # File cache counts as used, but goes when memory is wanted.
    return int(limit) - used + (_field(_CGROUP / "memory.stat", "inactive_file") or 0)


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
    except (OSError, ValueError, IndexError):
        return None
