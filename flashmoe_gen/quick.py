"""The usual arrays of a call looked at in less than a microsecond; the full check for all others, and for its errors."""

from __future__ import annotations

import functools
import sys
from typing import Any

from . import arrays
from .dtypes import numpy_dtype


class Matrix:
    """Checks contiguous arrays ``[rows, columns]`` of one dtype on one device, as :func:`flashmoe_gen.arrays.checked` does.

    Quick for what is exactly a ``torch.Tensor`` or a ``cupy.ndarray`` and right in every respect.

    Args:
        columns: their length.
        dtype: name of their type.
        device: where they must be.
        alignment: of their first element, in bytes.
    """

    def __init__(self, columns: int, dtype: str, device: str, alignment: int = 1) -> None:
        self._columns, self._dtype, self._device, self._alignment = columns, dtype, device, alignment
        self._numpy = numpy_dtype(dtype)
        self._byte_strides = (columns * self._numpy.itemsize, self._numpy.itemsize)
        self._strides = (columns, 1)
        self._torch: tuple[Any, Any, Any] | None = None  # torch's dtype, device and layout

    def checked(self, array: Any, name: str, rows: int | None, stream: arrays.Ordering) -> arrays.View:
        """A view; errors as :func:`flashmoe_gen.arrays.checked`. ``rows=None``: any number."""
        return self._looked_at(array, rows) or arrays.checked(array, name, (rows, self._columns), **self._options(stream))

    def writable(self, array: Any, name: str, rows: int, stream: arrays.Ordering) -> arrays.View:
        """A view of memory that will be written into; errors as :func:`flashmoe_gen.arrays.writable`."""
        return self._looked_at(array, rows) or arrays.writable(array, name, (rows, self._columns), **self._options(stream))

    def _options(self, stream: arrays.Ordering) -> dict[str, Any]:
        return {"dtype": self._dtype, "device": self._device, "stream": stream(), "alignment": self._alignment}

    def _looked_at(self, array: Any, rows: int | None) -> arrays.View | None:
        """A view of what is known to be right; nothing where there is any doubt."""
        library = _library_of(type(array))  # type: ignore[arg-type]
        if library == "torch":
            found = self._of_torch(array)
        elif library == "cupy":
            found = self._of_cupy(array)
        else:
            return None
        if found is None or rows not in (None, found.shape[0]) or not found.pointer or found.pointer % self._alignment:
            return None
        return found

    def _of_torch(self, tensor: Any) -> arrays.View | None:
        if self._torch is None:
            torch = sys.modules["torch"]
            self._torch = getattr(torch, self._dtype), torch.device(self._device), torch.strided
        dtype, device, layout = self._torch
        try:
            if (
                tensor.dtype is not dtype or tensor.device != device or tensor.layout is not layout or tensor.is_nested
                or tensor.requires_grad or tensor.is_neg() or not tensor.is_contiguous()
            ):  # fmt: skip
                return None
            shape, pointer, storage = tensor.shape, tensor.data_ptr(), tensor.untyped_storage()
        except (RuntimeError, ValueError):  # such as under vmap
            return None
        if len(shape) != 2 or shape[1] != self._columns:
            return None
        return arrays.View(pointer, shape, self._strides, self._dtype, "", self._device, (tensor, storage))

    def _of_cupy(self, array: Any) -> arrays.View | None:
        shape, data = array.shape, array.data
        if len(shape) != 2 or shape[1] != self._columns or array.strides != self._byte_strides or array.dtype != self._numpy:
            return None
        if f"cuda:{data.device_id}" != self._device:
            return None
        return arrays.View(data.ptr, shape, self._strides, self._dtype, "", self._device, array)


@functools.lru_cache
def _library_of(kind: type) -> str:
    """``"torch"`` or ``"cupy"`` for their arrays, not for subclasses, which may be anything."""
    for library, name in (("torch", "Tensor"), ("cupy", "ndarray")):
        if kind is getattr(sys.modules.get(library), name, None):
            return library
    return ""
