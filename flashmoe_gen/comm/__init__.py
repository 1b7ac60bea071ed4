"""Ranks that work together: who they are, the symmetric heap they share, and what happens when one of them fails."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

from ..errors import SpecError
from ..launch.choose import choose
from ..spec import MAX_WORLD_SIZE
from . import processes
from .bootstrap import find
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


def _checked_device(device: Any) -> int | None:
    if device is None:
        return None
    try:
        number = operator.index(device)
    except TypeError:
        number = -1
    if isinstance(device, bool) or number < 0:
        raise SpecError(f"device={device!r} is not valid. Must be None or the number of a GPU.")
    return number


def init(
    method: Literal["auto", "mpi", "torch", "env", "slurm", "single"] = "auto",
    *,
    target: Literal["host", "cuda"] | None = None,
    device: int | None = None,
    heap_bytes: int | None = None,
) -> Communicator:
    """The communicator of this process, which is one rank. Collective among the processes that a launcher has started.

    Args:
        method: how the processes find each other. ``"mpi"``: mpi4py, any MPI. ``"torch"``: torch.distributed, initialised with
            any backend, or the environment of torchrun. ``"env"``: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. ``"slurm"``: as a
            task of srun. ``"single"``: there is one process. ``"auto"``: what :func:`~flashmoe_gen.comm.bootstrap.launched` finds;
            logged at level info.
        target: ``"host"`` or ``"cuda"``; default: ``FLASHMOE_TARGET``, else ``"cuda"`` when a GPU is there.
        device: number of this rank's GPU; default: one for each rank of the machine; of one process, the current one.
        heap_bytes: bytes of a rank's symmetric heap, allocated now when there are several processes; default: what the layers
            need.

    Raises:
        SpecError: an argument, or a variable of a launcher, is not valid.
        UnsupportedError: a package is missing, or the processes are on several machines.
        CommError: the processes do not find each other before the deadline (``FLASHMOE_INIT_TIMEOUT_S``), or do not fit together.
    """
    if target not in (None, "host", "cuda"):
        raise SpecError(f"target={target!r} is not valid. Must be 'host' or 'cuda'.")
    if target == "host" and device is not None:
        raise SpecError("device= is not valid for target='host'.")
    number, nbytes = _checked_device(device), _checked_heap_bytes(heap_bytes)
    bootstrap = find(method)
    if bootstrap is None:
        group = LocalGroup(1, nbytes, None if number is None else [number])
        communicator = Communicator(LocalTransport(group, 0))
        if target is not None and number is None:
            communicator.bind(choose(target))
        return communicator
    try:
        return Communicator(processes.join(bootstrap, target=target, device=number, heap_bytes=nbytes))
    finally:
        bootstrap.close()


def local_group(
    world_size: int, *, heap_bytes: int | None = None, devices: Sequence[int] | None = None
) -> list[Communicator]:
    """In-process ranks, one communicator per rank; on the host target use each from a thread of its own.

    Args:
        world_size: 1 to 64.
        heap_bytes: bytes of a rank's symmetric heap; default: what the layers need.
        devices: number of each rank's GPU, whichever is the current one; ranks on the same one share it evenly. GPUs reach each
            other through peer access. Default: all ranks where their layers are made, on one GPU or on the host.

    Raises:
        SpecError: an argument is not valid.
    """
    try:
        count = operator.index(world_size)
    except TypeError:
        count = 0
    if isinstance(world_size, bool) or not 1 <= count <= MAX_WORLD_SIZE:
        raise SpecError(f"world_size={world_size!r} is not valid. Must be between 1 and {MAX_WORLD_SIZE}.")
    numbers = None
    if devices is not None:
        try:
            numbers = [number for number in map(_checked_device, devices) if number is not None]
        except (TypeError, SpecError):
            numbers = []
        if len(numbers) != count:
            raise SpecError(f"devices={devices!r} is not valid. Must be None or the number of a GPU for each of the {count} ranks.")
    group = LocalGroup(count, _checked_heap_bytes(heap_bytes), numbers)
    return [Communicator(LocalTransport(group, rank)) for rank in range(count)]
