"""The element types a kernel can be generated for."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .values import choice


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: the name users write, e.g. ``"bfloat16"``.
        size: bytes per element.
        accumulator: C++ type of sums (``float``, or ``double`` for float64).
        numpy: the NumPy dtype that holds it (``ml_dtypes.bfloat16`` for bfloat16).
    """

    name: str
    size: int
    accumulator: str
    numpy: np.dtype


DTYPES: dict[str, DType] = {
    "bfloat16": DType("bfloat16", 2, "float", np.dtype(ml_dtypes.bfloat16)),
    "float16": DType("float16", 2, "float", np.dtype(np.float16)),
    "float32": DType("float32", 4, "float", np.dtype(np.float32)),
    "float64": DType("float64", 8, "double", np.dtype(np.float64)),
}


def get_dtype(name: str) -> DType:
    """Look a type up by name; raise :class:`SpecError` naming the supported ones."""
    return DTYPES[choice("dtype", name, DTYPES)]


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name: those above, and NumPy's own (``"int32"``)."""
    return DTYPES[name].numpy if name in DTYPES else np.dtype(name)
