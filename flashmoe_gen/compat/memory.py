"""Arrays over raw addresses, and counts of expert ids in them: what differs between the targets."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .. import env
from ..dtypes import numpy_dtype
from ..errors import SpecError, UnsupportedError
from ..launch import cuda, streams
from ..launch.target import LaunchShape, Prepared, Target, loaded

ROW_ALIGNMENT = 16  # of tokens and matrices, in bytes
_COUNT_THREADS = 1024


def target_name() -> str:
    """``"host"`` or ``"cuda"``: what ``FLASHMOE_TARGET`` says, else ``"cuda"`` when a GPU is there."""
    return env.target() or ("cuda" if cuda.device_count() > 0 else "host")


def on_device(device_id: int, gpu_arch: int) -> AbstractContextManager[object]:
    """Inside, the GPU ``device_id`` is the current one; nothing for the host target.

    Raises:
        SpecError: there is no such GPU.
        UnsupportedError: it is of another ``gpu_arch``.
    """
    if target_name() == "host":
        return nullcontext()
    count = cuda.device_count()
    if not 0 <= device_id < count:
        raise SpecError(f"device_id={device_id!r} is not valid. This machine has {count} GPU(s), from 0 on.")
    import cupy

    device: AbstractContextManager[Any] = cupy.cuda.Device(device_id)
    found = 10 * int(device.compute_capability)  # type: ignore[attr-defined]
    if gpu_arch != found:
        raise UnsupportedError(f"gpu_arch={gpu_arch!r} is not supported on the GPU {device_id}. Must be {found}, which it is.")
    return device


def stream_of(target: Target, stream_ptr: int | None) -> Any:
    """The target's stream with this handle.

    Raises:
        UnsupportedError: the host target has none.
        SpecError: no handle.
    """
    if target.name == "host":
        if stream_ptr:
            raise UnsupportedError(f"stream_ptr={stream_ptr!r} is not supported: the host target has no streams. Must be 0.")
        return None
    if isinstance(stream_ptr, bool) or not isinstance(stream_ptr, int) or stream_ptr < 0:
        raise SpecError(f"stream_ptr={stream_ptr!r} is not valid. Must be the handle of a CUDA stream, as an integer.")
    return target.stream(stream_ptr, None)


def wait_for(target: Target, stream_ptr: int | None) -> None:
    """Wait for what a stream has been given so far."""
    stream = stream_of(target, stream_ptr)
    if stream is not None:
        with target.current():
            stream.synchronize()


def is_capturing(stream: Any) -> bool:
    """Whether a target's stream is being captured."""
    return stream is not None and streams.is_capturing(stream)


def array_at(target: Target, name: str, pointer: object, shape: Sequence[int], dtype: str, alignment: int = 1) -> Any:
    """The array at an address: CuPy's on a GPU, else NumPy's. Whoever gave the address keeps the memory.

    ``alignment`` is of its first element, in bytes.

    Raises:
        SpecError: no address, or on a GPU one that is not of its memory.
    """
    kind = numpy_dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    if isinstance(pointer, bool) or not isinstance(pointer, (int, np.integer)) or (pointer <= 0 and nbytes):
        given = repr(pointer) if isinstance(pointer, int) or pointer is None else f"<{type(pointer).__name__}>"
        raise SpecError(f"{name}={given} is not valid. Must be the address of {list(shape)} of {dtype}, as an integer.")
    address = int(pointer)
    if address % (multiple := max(alignment, kind.itemsize)):
        raise SpecError(f"{name}={address:#x} is not valid. Must be a multiple of {multiple}.")
    if target.name == "host":
        if not nbytes:
            return np.empty(shape, kind)
        raw: Any = (ctypes.c_char * nbytes).from_address(address)
        return np.frombuffer(raw, kind).reshape(shape)
    import cupy

    with target.current():
        if not nbytes:
            return cupy.empty(shape, kind)
        number = int(target.device.partition(":")[2])
        try:
            found = cupy.cuda.runtime.pointerGetAttributes(address)
            known = found.device == number and found.devicePointer
        except cupy.cuda.runtime.CUDARuntimeError:
            known = False
        if not known:
            raise SpecError(f"{name}={address:#x} is not valid. Must be an address in the memory of {target.device}.")
        memory = cupy.cuda.UnownedMemory(address, nbytes, None, number)
        return cupy.ndarray(tuple(shape), kind, cupy.cuda.MemoryPointer(memory, 0))


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """An array's elements where NumPy can read them."""
    return array if isinstance(array, np.ndarray) else array.get()


class Counter:
    """Counts expert ids, on a GPU with a kernel of its own; it allocates nothing.

    Args:
        target: where.
        experts: E.
    """

    def __init__(self, target: Target, experts: int) -> None:
        self._target, self._experts = target, experts
        self._kernel: Any = None
        if target.name == "cuda":
            build = cuda.build_program
            shape = LaunchShape(_COUNT_THREADS, 0)
            self._kernel = loaded(lambda: build("count_ids", target.arch), lambda made: target.load(made, shape))
            self._parameters: list[np.ndarray[Any, Any]] = [np.zeros(1, kind) for kind in ("u8", "u8", "i8", "i4")]
            self._prepared = Prepared(self._parameters[0], self._parameters[1:])

    def count(self, ids: Any, counts: Any, stream: Any) -> None:
        """Write into ``counts`` [E] how often each expert is in ``ids``, in the order of ``stream``."""
        if self._kernel is None:
            counts[:] = np.bincount(ids.reshape(-1), minlength=self._experts)
            return
        for parameter, value in zip(self._parameters, (ids.data.ptr, counts.data.ptr, ids.size, self._experts)):
            parameter[0] = value
        self._target.launch(self._kernel, self._prepared, 1, stream)
