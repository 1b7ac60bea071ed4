"""Tensor maps: how a Hopper kernel's loads walk over a matrix."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ..errors import FlashMoEError
from ..programs import TensorBox

_MOST = 64  # maps kept; weights that move at every call make new ones


class TensorMaps:
    """The tensor maps of a target's kernels, each encoded once per address."""

    def __init__(self) -> None:
        self._maps: dict[Any, np.ndarray[Any, Any]] = {}

    def encoded(self, box: TensorBox, args: Any) -> np.ndarray[Any, Any]:
        """The 128-byte tensor map of a box for one ``MoEArgs``."""
        given = [f"{box.name}_expert_stride", f"{box.name}_row_stride"]
        strides = [int(args[name]) if name in args.dtype.names else 0 for name in given]
        strides = [stride or follows for stride, follows in zip(strides, (box.rows * box.row_bytes, box.row_bytes))]
        # A rank without experts has no weights and never loads them, but a map must have an address.
        pointer, count = int(args[box.name]) or int(args["ring"]), max(1, int(args[box.count]))
        key = box, pointer, count, *strides
        if key not in self._maps:
            if len(self._maps) >= _MOST:
                self._maps.clear()
            self._maps[key] = _encode(box, pointer, count, *strides)
        return self._maps[key]

    def clear(self) -> None:
        """Let go of all of them."""
        self._maps.clear()


def _encode(box: TensorBox, pointer: int, count: int, matrix_stride: int, row_stride: int) -> np.ndarray[Any, Any]:
    """cuTensorMapEncodeTiled: [matrix][row][column], 128-byte swizzle, zeros beyond the edges; strides in bytes."""
    from cuda.bindings import driver

    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    types = driver.CUtensorMapDataType
    status, encoded = driver.cuTensorMapEncodeTiled(
        {2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16}[box.size],
        3,
        pointer,
        [wide(box.columns), wide(box.rows), wide(count)],
        [wide(row_stride), wide(matrix_stride)],
        [narrow(box.box_columns), narrow(box.box_rows), narrow(1)],
        [narrow(1)] * 3,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise FlashMoEError(f"The tensor map of {box.name} cannot be encoded: {status.name} for {box}.")
    map_bytes = np.frombuffer(ctypes.string_at(encoded.getPtr(), 128), np.uint8).copy()
    return np.asarray(map_bytes.view("V128"))
