"""Arrays as users hand them over: NumPy, or anything that speaks DLPack on the CPU. Zero-copy, checked, never converted."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import SpecError, UnsupportedError

# DLPack: dlpack.h, DLDataTypeCode and DLDeviceType.
_DL_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_DL_DEVICES = {1: "cpu", 2: "cuda", 3: "cuda_host", 10: "rocm", 13: "cuda_managed"}
_CPU_DEVICES = {1, 3}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class View:
    """An array's memory.

    Attributes:
        pointer: address of its first element.
        shape: its shape.
        strides: in elements.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, ``"float64"``, ``"int32"``, ...
        read_only: whether writing into it is refused by its owner.
        owner: what keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    read_only: bool
    owner: object

    def numpy(self) -> np.ndarray[Any, Any]:
        """The same memory as a NumPy array."""
        dtype = np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else np.dtype(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1
        memory: Any = (ctypes.c_char * (reach * dtype.itemsize)).from_address(self.pointer)
        flat = np.frombuffer(memory, dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.strides])


def _packed_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


def _numpy_view(array: np.ndarray[Any, Any], name: str) -> View:
    size = array.dtype.itemsize
    if any(stride % size for stride in array.strides):
        raise SpecError(f"{name} is not valid: its strides {array.strides} are not multiples of its {size}-byte elements.")
    strides = tuple(stride // size for stride in array.strides)
    read_only = not array.flags.writeable
    return View(array.ctypes.data, array.shape, strides, array.dtype.name, read_only, array)


def _dlpack_view(array: Any, name: str) -> View:
    try:
        device, _ = array.__dlpack_device__()
        if device not in _CPU_DEVICES:
            kind = _DL_DEVICES.get(int(device), f"DLPack device type {int(device)}")
            raise SpecError(f"{name} is on {kind!r}, but this layer runs on the host. Move it to the CPU or use target='cuda'.")
        capsule = array.__dlpack__()
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    except (SpecError, UnsupportedError):
        raise
    except Exception as error:
        raise SpecError(f"{name} cannot be read through DLPack: {error}") from error
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _packed_strides(shape)
    dtype = f"{_DL_CODES.get(tensor.code, 'type' + str(tensor.code))}{tensor.bits}"
    # The capsule is never renamed, so its own deleter frees the exporter's reference when the view goes.
    return View((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, False, (array, capsule))


def view(array: Any, name: str) -> View:
    """Look at an array without copying it.

    Raises:
        SpecError: not an array, or not in CPU memory.
        UnsupportedError: a torch tensor that requires gradients.
    """
    if getattr(array, "requires_grad", False):
        raise UnsupportedError(f"{name} requires gradients; flashmoe_gen runs inference alone. Pass {name}.detach().")
    if isinstance(array, np.ndarray):
        return _numpy_view(array, name)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack_view(array, name)
    raise SpecError(f"{name} is a {type(array).__name__}. Must be a NumPy array or an object with __dlpack__ (torch, JAX).")


def checked(array: Any, name: str, shape: Sequence[int | None], dtype: str, *, contiguous: bool = True) -> View:
    """A view of an array that must have this shape (``None``: any size) and dtype.

    ``contiguous=False`` asks only that the last axis be contiguous.

    Raises:
        SpecError: wrong shape, dtype or strides; names the argument, what it is and what it must be.
        UnsupportedError: as :func:`view`.
    """
    found = view(array, name)
    if found.dtype != dtype:
        raise SpecError(f"{name} has dtype {found.dtype}. Must be {dtype}.")
    if len(found.shape) != len(shape) or any(want not in (None, have) for have, want in zip(found.shape, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(f"{name} has shape {found.shape}. Must be ({wanted}).")
    packed = _packed_strides(found.shape)
    matters = [i for i, size in enumerate(found.shape) if size > 1]
    if 0 in found.shape:
        return found
    wrong = matters if contiguous else [i for i in matters if i == len(shape) - 1]
    if any(found.strides[i] != packed[i] for i in wrong):
        kind = "contiguous" if contiguous else "contiguous along its last axis"
        raise SpecError(f"{name} has strides {found.strides} (in elements). Must be {kind}: pass a contiguous copy.")
    if any(found.strides[i] < 0 for i in matters):
        raise SpecError(f"{name} has negative strides {found.strides}. Pass a contiguous copy.")
    return found


def empty_like(array: Any, shape: Sequence[int], dtype: str) -> Any:
    """Memory for an output that goes with ``array``: torch for torch, NumPy for all others (see :func:`exported`)."""
    if _library(array) == "torch":
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return np.empty(shape, np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else dtype)


def exported(result: Any, array: Any) -> Any:
    """An output of :func:`empty_like` as the kind of ``array``: JAX arrays are immutable, so theirs are made at the end."""
    return sys.modules["jax"].numpy.asarray(result) if _library(array).startswith("jax") else result


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]
