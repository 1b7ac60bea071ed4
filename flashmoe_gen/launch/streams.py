"""CUDA streams of any library, and what must get past them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecError


def pinned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A zeroed array like ``array`` in page-locked memory."""
    import cupy

    pinned = cupy.cuda.alloc_pinned_memory(array.nbytes)
    made = np.frombuffer(pinned, array.dtype, array.size)
    made[:] = 0
    return made


@functools.lru_cache
def interrupter(device: str) -> tuple[np.ndarray[Any, Any], Any]:
    """A word that is not 0 in page-locked memory, and a stream of no call."""
    import cupy

    source = pinned(np.zeros(1, np.uint32))
    source[0] = 1
    return source, cupy.cuda.Stream(non_blocking=True)


def is_capturing(stream: Any) -> bool:
    import cupy

    try:
        return bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))
    except cupy.cuda.runtime.CUDARuntimeError:  # the legacy stream says so while another one captures
        return True


@dataclass(frozen=True)
class _Handle:
    """A raw stream handle that speaks the CUDA stream protocol."""

    value: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.value


@functools.lru_cache
def of_handle(handle: int) -> Any:
    """A CuPy stream of a raw handle, which somebody else keeps."""
    import cupy

    return cupy.cuda.Stream.from_external(_Handle(handle))


def external(given: Any) -> Any:
    """A CuPy stream of anything that is one: ``__cuda_stream__`` (cuda.core), torch, CuPy, or the handle itself."""
    import cupy

    if isinstance(given, cupy.cuda.Stream):
        return given
    if not hasattr(given, "__cuda_stream__"):
        handle = getattr(given, "cuda_stream", None) or getattr(given, "ptr", given)
        if isinstance(handle, bool) or not isinstance(handle, int):
            raise SpecError(f"stream is a {type(given).__name__}. Must be a CUDA stream: __cuda_stream__, torch, CuPy or a handle.")
        return of_handle(handle)
    return cupy.cuda.Stream.from_external(given)
