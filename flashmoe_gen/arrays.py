"""Arrays as users hand them over: NumPy, CuPy, torch, or anything that speaks DLPack. Zero-copy, checked, never converted."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .dtypes import numpy_dtype
from .errors import SpecError, UnsupportedError

# DLPack: dlpack.h, DLDataTypeCode and DLDeviceType.
_DL_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_DL_DEVICES = {1: "cpu", 2: "cuda", 3: "cuda_host", 10: "rocm", 13: "cuda_managed"}
_CPU_DEVICES, _CUDA = {1, 3}, 2


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


class _VersionedTensor(ctypes.Structure):  # DLPack 1.0: DLManagedTensorVersioned
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_DL_VERSION = (1, 0)
_DL_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


class View(NamedTuple):
    """An array's memory, and what keeps it there: the address is good as long as the view lives.

    Attributes:
        pointer: address of its first element.
        shape: its shape.
        strides: in elements.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, ``"float64"``, ``"int32"``, ...
        read_only: why nothing may be written into it; empty when it may.
        device: ``"cpu"``, ``"cuda:N"`` or another library's name for where it is.
        owner: the array.
        capsule: the DLPack capsule that lends the memory, or ``None``: the array's library knows how long kernels use it.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    read_only: str
    device: str
    owner: object
    capsule: object = None

    def numpy(self) -> np.ndarray[Any, Any]:
        """The same memory as a NumPy array."""
        dtype = numpy_dtype(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1
        memory: Any = (ctypes.c_char * (reach * dtype.itemsize)).from_address(self.pointer)
        flat = np.frombuffer(memory, dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.strides])


@functools.lru_cache
def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


@functools.lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """NumPy's name of a dtype, which it makes anew each time, with the byte order where it is not this machine's."""
    return str(dtype.name) if dtype.isnative else f"{dtype.name} in the other byte order"


def _numpy_view(array: np.ndarray[Any, Any], name: str) -> View:
    if isinstance(array, np.ma.MaskedArray):
        raise SpecError(f"{name} is a masked array, whose mask would be ignored. Pass its filled() values.")
    size = array.dtype.itemsize
    if size == 0 or [stride for stride in array.strides if stride % size]:
        raise SpecError(f"{name} is not valid: its strides {array.strides} are not multiples of its {size}-byte elements.")
    strides = tuple([stride // size for stride in array.strides])
    read_only = "" if array.flags.writeable else "is read-only"
    return View(array.ctypes.data, array.shape, strides, _name_of(array.dtype), read_only, "cpu", array)


def _refuse_gradient(array: Any, name: str) -> None:
    if not getattr(array, "requires_grad", False):
        return
    torch = sys.modules.get("torch")
    if torch is None or torch.is_grad_enabled():
        raise UnsupportedError(
            f"{name} requires gradients; flashmoe_gen runs inference alone. Pass {name}.detach(), or call it under torch.no_grad()."
        )


@functools.lru_cache
def _text_of(value: Any) -> str:
    """The text of a torch dtype or device, which torch makes anew each time."""
    return str(value).removeprefix("torch.")


def _torch_view(tensor: Any, name: str) -> View:
    if tensor.requires_grad:
        _refuse_gradient(tensor, name)
    try:
        if tensor.layout is not sys.modules["torch"].strided or tensor.is_nested:
            kind = f"{_kind(tensor)} of layout {tensor.layout}"
            raise SpecError(f"{name} is a {kind}, without one block of memory. Pass a dense tensor.")
        if tensor.is_neg() or tensor.is_conj():
            raise SpecError(f"{name} is a view whose negation or conjugation is pending. Pass {name}.resolve_neg().resolve_conj().")
        if getattr(tensor, "fake_mode", None) is not None:  # asking it for its memory warns, and may end the process one day
            raise SpecError(f"{name} is a {_kind(tensor)}, which has no memory. Pass a tensor with data.")
        pointer, shape, device = tensor.data_ptr(), tuple(tensor.shape), _text_of(tensor.device)
        if pointer == 0 and 0 not in shape:
            raise SpecError(f"{name} is a {_kind(tensor)} on {device!r} that has no memory. Pass a tensor with data.")
        # The storage too: `tensor.data = other` gives the tensor another one.
        owner = tensor, tensor.untyped_storage()
        return View(pointer, shape, tensor.stride(), _text_of(tensor.dtype), "", device, owner)
    except SpecError:
        raise
    except (RuntimeError, ValueError) as error:  # such as under vmap, or of a parameter that has no shape yet
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(f"{name} is a {_kind(tensor)} whose memory cannot be read: {reason}") from error


def _kind(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _cupy_view(array: Any, name: str) -> View:
    try:
        size = array.dtype.itemsize
        strides = tuple([stride // size for stride in array.strides])
    except AttributeError:  # a sparse matrix
        raise SpecError(f"{name} is a {_kind(array)}, without one block of memory. Pass a cupy.ndarray.") from None
    return View(int(array.data.ptr), array.shape, strides, _name_of(array.dtype), "", f"cuda:{array.data.device_id}", array)


def _require_device(name: str, found: str, device: str | None) -> None:
    if device is not None and found != device:
        raise SpecError(f"{name} is on {found!r}, but this layer runs on {device!r}.")


def _capsule(array: Any, kind: int, stream: int) -> object:
    """Ask for a versioned capsule, which says whether its memory is read-only; older exporters know no versions."""
    options: dict[str, Any] = {} if kind in _CPU_DEVICES else {"stream": stream}
    try:
        return array.__dlpack__(**options, max_version=_DL_VERSION)
    except TypeError:
        return array.__dlpack__(**options)


def _dlpack_view(array: Any, name: str, device: str | None, stream: int) -> View:
    _refuse_gradient(array, name)
    try:
        kind, index = map(int, array.__dlpack_device__())
        found = "cpu" if kind in _CPU_DEVICES else f"{_DL_DEVICES.get(kind, f'DLPack device type {kind}')}:{index}"
        _require_device(name, found, device)
        capsule = _capsule(array, kind, stream)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(f"{name} cannot be read through DLPack: {error}") from error
    if _capsule_is(capsule, b"dltensor_versioned"):
        versioned = _VersionedTensor.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != _DL_VERSION[0]:
            raise SpecError(f"{name} is exported as DLPack {versioned.major}.{versioned.minor}. Must be {_DL_VERSION[0]}.x.")
        tensor, read_only = versioned.tensor, "is read-only" if versioned.flags & _DL_READ_ONLY else ""
    elif _capsule_is(capsule, b"dltensor"):
        tensor, read_only = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")), _UNSAID
    else:
        raise SpecError(f"{name} cannot be read through DLPack: {type(array).__name__}.__dlpack__() returned no DLPack capsule.")
    if tensor.lanes != 1:
        raise SpecError(f"{name} is not valid: its elements are vectors of {tensor.lanes}. Must be scalars.")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _packed_strides(shape)
    dtype = f"{_DL_CODES.get(tensor.code, 'type' + str(tensor.code))}{tensor.bits}"
    pointer = (tensor.data or 0) + tensor.byte_offset
    if pointer == 0 and 0 not in shape:
        raise SpecError(f"{name} is a {_kind(array)} that has no memory.")
    # The capsule is never renamed, so its own deleter frees the exporter's reference when the view goes.
    return View(pointer, shape, strides, dtype, read_only, found, array, capsule)


NO_STREAM = -1  # DLPack: the caller has ordered what comes before
Ordering = Callable[[], int]  # gives the stream that exporters of DLPack let wait for their memory: only they need it
_UNSAID = "does not say that it may be written: it does not speak DLPack 1.0, and others may share its memory"
_VIEWS = {"torch": _torch_view, "cupy": _cupy_view, "cupyx": _cupy_view}


def unordered() -> int:
    """An :data:`Ordering` for callers that have waited themselves."""
    return NO_STREAM


def identity(array: Any) -> Any:
    """Something cheap that is equal as long as an array's view is: its memory may be replaced (``parameter.data = ...``)."""
    library = _library(array)
    if library == "cupy":
        return array.data.ptr, array.shape, array.strides, array.dtype
    if library == "torch":
        if not _plain(type(array)) and getattr(array, "fake_mode", None) is not None:  # type: ignore[arg-type]
            return object()
        try:
            gradient = array.requires_grad and sys.modules["torch"].is_grad_enabled()
            return array.data_ptr(), array.shape, array.stride(), array.dtype, gradient, array.is_neg()
        except (RuntimeError, ValueError):
            return object()
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype
    return object()  # it lends its memory through a capsule: look again each time


def view(array: Any, name: str, device: str | None = None, stream: int = NO_STREAM) -> View:
    """Look at an array without copying it. What speaks DLPack alone lets ``stream`` wait until its memory is ready.

    Raises:
        SpecError: not an array, or not on ``device``.
        UnsupportedError: a torch tensor that requires gradients.
    """
    if isinstance(array, np.ndarray):
        return _numpy_view(array, name)
    if known := _VIEWS.get(_library(array)):
        return known(array, name)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack_view(array, name, device, stream)
    raise SpecError(f"{name} is a {type(array).__name__}. Must be a NumPy, CuPy or torch array, or an object with __dlpack__.")


def checked(
    array: Any,
    name: str,
    shape: Sequence[int | None],
    dtype: str,
    *,
    device: str = "cpu",
    stream: int = NO_STREAM,
    contiguous: bool = True,
    alignment: int = 1,
) -> View:
    """A view of an array that must have this shape (``None``: any size) and dtype, and be on this device.

    ``contiguous=False`` asks only that the last axis be contiguous; ``alignment`` is of its first element, in bytes.

    Raises:
        SpecError: wrong device, shape, dtype, strides or alignment; names the argument, what it is and what it must be.
        UnsupportedError: as :func:`view`.
    """
    found = view(array, name, device, stream)
    _require_device(name, found.device, device)
    if found.dtype != dtype:
        raise SpecError(f"{name} has dtype {found.dtype}. Must be {dtype}.")
    if len(found.shape) != len(shape) or [want for have, want in zip(found.shape, shape) if want not in (None, have)]:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(f"{name} has shape {found.shape}. Must be ({wanted}).")
    if found.pointer % alignment and 0 not in found.shape:
        raise SpecError(f"{name} does not start at a multiple of {alignment} bytes. Pass a copy.")
    packed = _packed_strides(found.shape)
    if found.strides == packed:
        return found
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


def writable(array: Any, name: str, shape: Sequence[int | None], dtype: str, **options: Any) -> View:
    """As :func:`checked`, of an array that will be written into.

    Raises:
        SpecError: also when its owner does not allow that.
    """
    if _library(array) in ("jax", "jaxlib"):
        raise SpecError(f"{name} is a JAX array, which is immutable: others may share its memory. Leave {name}= out.")
    found = checked(array, name, shape, dtype, **options)
    if found.read_only:
        raise SpecError(f"{name} {found.read_only}.")
    return found


def empty_like(array: Any, shape: Sequence[int], dtype: str) -> Any:
    """Memory for an output that goes with ``array``: of torch for torch, else CuPy's or NumPy's (see :func:`exported`)."""
    library = _library(array)
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=array.device)
    made = numpy_dtype(dtype)
    if library == "numpy":
        return np.empty(shape, made)
    kind, number = (_CUDA, array.data.device_id) if library == "cupy" else array.__dlpack_device__()
    if kind in _CPU_DEVICES:
        return np.empty(shape, made)
    cupy = importlib.import_module("cupy")
    with cupy.cuda.Device(int(number)):
        return cupy.empty(shape, made)


def exported(result: Any, array: Any) -> Any:
    """An output of :func:`empty_like` as the kind of ``array``: JAX arrays are immutable, so theirs are made at the end."""
    if not _library(array).startswith("jax"):
        return result
    jax = importlib.import_module("jax")
    return jax.numpy.asarray(result) if isinstance(result, np.ndarray) else jax.dlpack.from_dlpack(result)


def is_torch_int64(array: Any) -> bool:
    """Whether an array is what ``torch.topk`` gives as indices: torch has no other type for them."""
    return _library(array) == "torch" and array.dtype is sys.modules["torch"].int64


@functools.lru_cache
def _plain(kind: type) -> bool:
    """Whether a kind of tensor is torch's own, of which each has memory."""
    torch = sys.modules["torch"]
    return kind in (torch.Tensor, torch.nn.Parameter)


def _library(array: Any) -> str:
    return _library_of(type(array))  # type: ignore[arg-type]


@functools.lru_cache
def _library_of(kind: type) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(kind, torch.Tensor):  # a subclass may be defined anywhere
        return "torch"
    return kind.__module__.partition(".")[0]
