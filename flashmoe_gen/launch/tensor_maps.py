"""Tensor maps: how a Hopper kernel's loads walk over a matrix."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ..errors import FlashMoEError
from ..programs import TensorBox


def encode(
    box: TensorBox, pointer: int, count: int, matrix_stride: int, row_stride: int
) -> np.ndarray[Any, Any]:
    """cuTensorMapEncodeTiled: [matrix][row][column], 128-byte swizzle, zeros beyond the edges."""
    from cuda.bindings import driver

    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    types = driver.CUtensorMapDataType
    status, encoded = driver.cuTensorMapEncodeTiled(
        {2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16}[box.size],
        3,
        pointer,
        [wide(box.columns), wide(box.rows), wide(count)],
        [wide(row_stride * box.size), wide(matrix_stride * box.size)],
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
