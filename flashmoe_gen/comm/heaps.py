"""Heaps in memory that the processes of one machine share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import CommError, FlashMoEError
from ..launch.host import HostMemory
from ..launch.target import Memory
from .base import Heaps, HeapSource
from .shared import SharedMemory

Exchange = Callable[[Any], list[Any]]

_PAGE = 4096


def share(nbytes: int, rank: int, exchange: Exchange) -> SharedMemory:
    """Collective: memory that rank 0 reserves and the others open.

    Raises:
        CommError: on all ranks, when one cannot.
    """
    memory, why = None, ""
    try:
        if rank == 0:
            memory = SharedMemory.make(nbytes)
    except FlashMoEError as error:
        why = str(error)
    handle, why = exchange((memory.handle if memory is not None else None, why))[0]
    try:
        if memory is None and not why:
            memory = SharedMemory.open(handle)
    except CommError as error:
        why = str(error)
    for told in exchange(why):
        if told:
            raise CommError(told)
    assert memory is not None
    return memory


class HostHeaps:
    """See :class:`~flashmoe_gen.comm.base.Heaps`."""

    def __init__(self, memory: SharedMemory, rank: int, world_size: int, nbytes: int) -> None:
        stride = memory.array.nbytes // world_size
        parts = [memory.array[peer * stride : peer * stride + nbytes] for peer in range(world_size)]
        self._memory: SharedMemory | None = memory
        self._words = [part.view(np.uint32) for part in parts]
        self.pointers = [part.ctypes.data for part in parts]
        self.mine: Memory = HostMemory(parts[rank])

    def interrupt(self, at: int) -> None:
        for words in self._words:
            words[at // 4] = 1

    def release(self, *, abort: bool) -> None:
        if abort and self._memory is not None:  # kernels of this process may still run
            self._memory.keep()
        self._memory, self._words, self.pointers = None, [], []
        self.mine = HostMemory(np.empty(0, np.uint8))


class HostHeapSource:
    """Shared memory, reserved by the first rank for all. See :class:`~flashmoe_gen.comm.base.HeapSource`."""

    collective = False

    def __init__(self, rank: int, world_size: int, exchange: Exchange) -> None:
        self._rank, self._world, self._exchange = rank, world_size, exchange

    def allocate(self, nbytes: int) -> Heaps:
        stride = -(-nbytes // _PAGE) * _PAGE
        return HostHeaps(share(stride * self._world, self._rank, self._exchange), self._rank, self._world, nbytes)

    def part(self, members: Sequence[int], exchange: Exchange) -> HeapSource:
        return HostHeapSource(list(members).index(self._rank), len(members), exchange)

    def close(self, *, abort: bool) -> None:
        pass
