"""Ranks that work together: who they are, the symmetric heap they share, and what happens when one of them fails."""

from __future__ import annotations

import operator
import os
from typing import Any, Literal

from ..errors import SpecError, UnsupportedError
from ..spec import MAX_WORLD_SIZE
from .communicator import Communicator
from .local import LocalGroup, LocalTransport

__all__ = ["Communicator", "init", "local_group"]

_MOST_HEAP_BYTES = 1 << 62


def _checked_heap_bytes(heap_bytes: Any) -> int | None:
    if heap_bytes is None:
        return None
    try:
        count = operator.index(heap_bytes)
    except TypeError:
        count = -1
    if isinstance(heap_bytes, bool) or not 0 <= count <= _MOST_HEAP_BYTES:
        raise SpecError(f"heap_bytes={heap_bytes!r} is not valid. Must be None or an integer between 0 and 2**62.")
    return count


def _world_of_launcher() -> tuple[str, int]:
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            return name, int(value)
    return "", 1


def init(
    method: Literal["auto", "mpi", "torch", "slurm", "single"] = "auto", *, heap_bytes: int | None = None
) -> Communicator:
    """The communicator of this process.

    Args:
        method: ``"single"``: one rank. ``"auto"``: one rank too, unless a launcher started several processes.
        heap_bytes: size of the symmetric heap; default: what the layers need.

    Raises:
        UnsupportedError: several processes. This version's ranks live in one process: :func:`local_group`.
        SpecError: unknown method.
    """
    if method not in ("auto", "mpi", "torch", "slurm", "single"):
        raise SpecError(f"method={method!r} is not valid. Must be 'auto', 'mpi', 'torch', 'slurm' or 'single'.")
    variable, processes = _world_of_launcher()
    if method in ("mpi", "torch", "slurm") or (method == "auto" and processes > 1):
        why = f"{variable}={processes} says so; " if method == "auto" else ""
        raise UnsupportedError(
            f"method={method!r}: ranks in several processes are not supported ({why}it needs NVSHMEM). "
            "Supported: 'single', and comm.local_group(world_size) for several ranks in one process."
        )
    return Communicator(LocalTransport(LocalGroup(1, _checked_heap_bytes(heap_bytes)), 0))


def local_group(world_size: int, *, heap_bytes: int | None = None) -> list[Communicator]:
    """In-process ranks, one communicator per rank; on the host target use each from a thread of its own.

    Args:
        world_size: 1 to 8.
        heap_bytes: limit of one rank's symmetric heap; default: what the layers need.

    Raises:
        SpecError: ``world_size`` out of range.
    """
    try:
        count = operator.index(world_size)
    except TypeError:
        count = 0
    if isinstance(world_size, bool) or not 1 <= count <= MAX_WORLD_SIZE:
        raise SpecError(f"world_size={world_size!r} is not valid. Must be between 1 and {MAX_WORLD_SIZE}.")
    group = LocalGroup(count, _checked_heap_bytes(heap_bytes))
    return [Communicator(LocalTransport(group, rank)) for rank in range(count)]
