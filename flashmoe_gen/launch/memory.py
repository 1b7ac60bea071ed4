"""Memory of a GPU, taken from CuPy's pool."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CommError


class CudaMemory:
    """Zeroed memory of one GPU, whichever is the current one; CuPy's pool aligns to 512 bytes."""

    def __init__(self, nbytes: int, device: int) -> None:
        import cupy

        self._device = device
        with cupy.cuda.Device(device):
            try:
                self._array = cupy.zeros(max(nbytes, 1), cupy.uint8)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise CommError(f"The GPU has no {nbytes} bytes of memory left: {error}") from None
            cupy.cuda.get_current_stream().synchronize()  # zero before a launch on any other stream
        self.pointer = int(self._array.data.ptr)
        self.nbytes = nbytes

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        import cupy

        with cupy.cuda.Device(self._device):
            cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.memset(self.pointer + offset, value, nbytes)
            cupy.cuda.runtime.deviceSynchronize()

    def read(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        import cupy

        with cupy.cuda.Device(self._device):
            cupy.cuda.runtime.deviceSynchronize()
            return np.asarray(cupy.asnumpy(self._array[offset : offset + nbytes]))


def peer_access(device: int, peer: int) -> str:
    """Let kernels of a GPU use the memory of another one of this process; ``""``, or why they cannot."""
    import cupy

    runtime = cupy.cuda.runtime
    if not runtime.deviceCanAccessPeer(device, peer):
        return f"GPU {device} cannot access the memory of GPU {peer}: see `nvidia-smi topo -p2p rw`."
    allocator = cupy.cuda.get_allocator()
    if allocator is cupy.cuda.malloc_async or isinstance(getattr(allocator, "__self__", None), cupy.cuda.MemoryAsyncPool):
        return (
            "CuPy allocates with cudaMallocAsync (malloc_async or a MemoryAsyncPool), whose memory other GPUs cannot use. "
            "Use CuPy's default allocator."
        )
    with cupy.cuda.Device(device):
        try:
            runtime.deviceEnablePeerAccess(peer)
        except runtime.CUDARuntimeError as error:
            if "PeerAccessAlreadyEnabled" not in str(error):
                return f"GPU {device} cannot access the memory of GPU {peer}: {error}"
    return ""
