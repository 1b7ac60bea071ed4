"""Heaps of GPUs in several processes: symmetric memory of NVSHMEM, which kernels reach through peers' pointers.

Only the allocation is NVSHMEM's: kernels store through the addresses that ``nvshmem_ptr`` gives, so they need none of its
device code. Allocations are collective over all processes, and are given back in the order in which they were made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import packages
from ..errors import CommError, FlashMoEError, SpecError, UnsupportedError
from ..launch import streams
from ..launch.memory import CudaMemory
from ..launch.target import Memory
from .base import Heaps, HeapSource

logger = logging.getLogger("flashmoe_gen")

Exchange = Callable[[Any], list[Any]]

# NVLink multicast is of no use to stores to one peer, and where it is half set up it can fail the whole initialisation.
_SETTINGS = {"NVSHMEM_DISABLE_NVLS": "1"}
_INITIALIZED = 2  # of nvshmemx_init_status_t: from here on
_DEFAULT_KIND = 4  # cudaMemcpyDefault: whose memory it is follows from the address


class _Symmetric(CudaMemory):
    """A rank's own part of a symmetric allocation, which somebody else gives back."""

    def __init__(self, pointer: int, nbytes: int, device: int) -> None:
        import cupy

        self._device, self.pointer, self.nbytes = device, pointer, nbytes
        memory = cupy.cuda.UnownedMemory(pointer, nbytes, self, device)
        self._array = cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))


class NvshmemHeaps:
    """See :class:`~flashmoe_gen.comm.base.Heaps`."""

    def __init__(self, source: NvshmemSource, base: int, nbytes: int) -> None:
        self._source, self._base = source, base
        self.pointers = [source.pointer(base, member) for member in range(len(source.members))]
        self.mine: Memory = _Symmetric(base, nbytes, source.device)
        self.mine.fill(0, nbytes, 0)

    def interrupt(self, at: int) -> None:
        """By the copy engine of this rank's GPU, whose multiprocessors, and those of the peers, may all be taken."""
        import cupy

        with cupy.cuda.Device(self._source.device):
            word, stream = streams.interrupter(f"cuda:{self._source.device}")
            for member, pointer in enumerate(self.pointers):
                try:
                    cupy.cuda.runtime.memcpyAsync(pointer + at, word.ctypes.data, 4, _DEFAULT_KIND, stream.ptr)
                except cupy.cuda.runtime.CUDARuntimeError as error:
                    logger.warning("the kernel of rank %d cannot be ended from here: %s", member, error)

    def release(self, *, abort: bool) -> None:
        self.pointers = []
        if not abort:
            self._source.give_back(self._base)


class NvshmemSource:
    """Symmetric memory of all processes, or of the members of a sub-group. See :class:`~flashmoe_gen.comm.base.HeapSource`.

    Args:
        device: number of this process's GPU.
        members: the group's ranks among all processes.
        heap_bytes: of a sub-group's heap.
        arena: where a sub-group's heap is, ``None``: this is the group of all.
        initialized: whether NVSHMEM is ours to finalize.
    """

    def __init__(
        self, device: int, members: Sequence[int], heap_bytes: int | None, arena: int | None = None, initialized: bool = False
    ) -> None:
        self.device, self.members, self.collective = device, tuple(members), arena is None
        self._heap_bytes, self._arena, self._initialized = heap_bytes, arena, initialized
        self._made: list[int] = []  # not given back, in order
        self._closed = False

    @classmethod
    def join(
        cls, rank: int, world_size: int, device: int, exchange: Exchange, heap_bytes: int | None
    ) -> NvshmemSource:
        """Collective: initialise NVSHMEM in all processes, or adopt the one that is.

        Args:
            rank: of this process; NVSHMEM's number of it, too.
            world_size: processes.
            device: number of its GPU.
            exchange: collective among them.
            heap_bytes: size of the heap of each communicator; ``None``: as large as its layers need.

        Raises:
            CommError: on all ranks: one cannot, or NVSHMEM numbers its processes otherwise.
        """
        identity, why = "", ""
        try:
            there = _is_initialized(device)
            if not there and rank == 0:
                identity = _core().get_unique_id()._data.tobytes().hex()
        except Exception as error:  # whatever a missing or broken library raises: the others wait for word
            there, why = False, str(error) if isinstance(error, FlashMoEError) else f"{type(error).__name__}: {error}"
        told = exchange((identity, why, there))
        for peer, (_, failed, _) in enumerate(told):
            if failed:
                raise CommError(f"Rank {peer} cannot use NVSHMEM: {failed}")
        if len({each[2] for each in told}) > 1:
            by = ", ".join(str(peer) for peer, each in enumerate(told) if each[2])
            raise CommError(f"NVSHMEM is already initialised by ranks {by} alone. Must be by all of them or none.")
        try:
            if not there:
                _initialize(rank, world_size, device, told[0][0])
            _require_place(rank, world_size)
        except Exception as error:
            why = str(error)
        for peer, failed in enumerate(exchange(why)):
            if failed:
                raise CommError(f"Rank {peer} cannot use NVSHMEM: {failed}")
        return cls(device, range(world_size), heap_bytes, initialized=not there)

    def pointer(self, base: int, member: int) -> int:
        """Where a member's part of the allocation at ``base`` is, as kernels here see it.

        Raises:
            CommError: the GPUs do not reach each other.
        """
        found = int(_bindings().ptr(base, self.members[member]))
        if not found:
            raise CommError(
                f"GPU {self.device} of this rank cannot address the memory of rank {member}: no NVLink, and no peer access over "
                "PCIe. Supported: GPUs of one machine that reach each other (see `nvidia-smi topo -p2p rw`)."
            )
        return found

    def allocate(self, nbytes: int) -> Heaps:
        if self._arena is None:
            return NvshmemHeaps(self, self._malloc(nbytes), nbytes)
        assert self._heap_bytes is not None
        if nbytes > self._heap_bytes:
            raise CommError(f"heap_bytes={self._heap_bytes} is too small: {nbytes} bytes are needed.")
        return NvshmemHeaps(self, self._arena, nbytes)

    def part(self, members: Sequence[int], exchange: Exchange) -> HeapSource:
        """All ranks come here at the same time, each with its own group: so all allocate, and each group uses its part."""
        if self._arena is not None:
            raise UnsupportedError(
                "split() of a sub-group is not supported on GPUs in several processes. Supported: split() of the whole group."
            )
        if self._heap_bytes is None:
            raise SpecError(
                "split() on GPUs in several processes needs the size of the heaps in advance, since NVSHMEM allocates for all of "
                "them at once: comm.init(heap_bytes=...), with what the largest group's layers need."
            )
        return NvshmemSource(self.device, members, self._heap_bytes, self._malloc(self._heap_bytes))

    def give_back(self, base: int) -> None:
        """Collective; what sub-groups use stays until the group of all is closed."""
        if base in self._made:
            self._made.remove(base)
            _bindings().free(base)

    def close(self, *, abort: bool) -> None:
        """``abort``: NVSHMEM's finalize would wait for ranks that are no more, and its memory may still be stored into."""
        if self._closed:
            return
        self._closed = True
        if abort or self._arena is not None:
            return
        for base in list(self._made):
            self.give_back(base)
        if self._initialized:
            _core().finalize()

    def _malloc(self, nbytes: int) -> int:
        import cupy

        with cupy.cuda.Device(self.device):
            base = int(_bindings().malloc(nbytes))
        if not base:
            raise CommError(
                f"NVSHMEM has no {nbytes} bytes of symmetric memory left on GPU {self.device}. Its limits are "
                "NVSHMEM_MAX_MEMORY_PER_GPU and, without virtual memory management, NVSHMEM_SYMMETRIC_SIZE."
            )
        self._made.append(base)
        return base


def _core() -> Any:
    """NVSHMEM's Python package, checked to be of the pair that was tested."""
    packages.check_nvshmem()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import nvshmem.core

    return nvshmem.core


def _bindings() -> Any:
    import nvshmem.bindings

    return nvshmem.bindings


def _is_initialized(device: int) -> bool:
    import cupy

    with cupy.cuda.Device(device):
        core = _core()
        core.get_version()  # loads the library
        return bool(int(core.init_status()) >= _INITIALIZED)


def _initialize(rank: int, world_size: int, device: int, identity: str) -> None:
    import cupy
    from cuda.core import Device

    core = _core()
    cupy.cuda.Device(device).use()  # NVSHMEM belongs to the device that is current now
    place = Device(device)
    place.set_current()
    unique = core.get_unique_id(empty=True)
    unique._data[:] = np.frombuffer(bytes.fromhex(identity), unique._data.dtype).reshape(unique._data.shape)
    core.init(device=place, uid=unique, rank=rank, nranks=world_size, initializer_method="uid")


def _require_place(rank: int, world_size: int) -> None:
    core = _core()
    found = int(core.my_pe()), int(core.n_pes())
    if found != (rank, world_size):
        raise CommError(
            f"NVSHMEM, initialised by this program, calls this process number {found[0]} of {found[1]}; it is rank {rank} of "
            f"{world_size}. Must be the same."
        )
