"""What of CUDA is usable on this machine. Imports CuPy only when asked."""

from __future__ import annotations

import importlib.util
import logging

from ..errors import FlashMoEError, UnsupportedError

logger = logging.getLogger("flashmoe_gen")


def device_count() -> int:
    """GPUs this process can use; 0 without CuPy, driver or GPU."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        logger.debug("no usable GPU: %s", error)
        return 0


def require_device() -> None:
    """Return if a GPU is usable.

    Raises:
        UnsupportedError: CuPy is not installed; names the extras.
        FlashMoEError: no driver, or no GPU.
    """
    if importlib.util.find_spec("cupy") is None:
        raise UnsupportedError(
            "target='cuda' needs CuPy, which is not installed: pip install 'flashmoe_gen[cu12]' (CUDA 12) "
            "or 'flashmoe_gen[cu13]' (CUDA 13)."
        )
    try:
        import cupy
    except Exception as error:
        raise FlashMoEError(f"CuPy cannot be imported: {error}") from error
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        text = str(error)
        if "InsufficientDriver" in text:
            raise FlashMoEError(f"target='cuda': no NVIDIA driver, or one too old for this CuPy ({text}).") from error
        if "NoDevice" in text:
            raise FlashMoEError(f"target='cuda': the NVIDIA driver finds no GPU ({text}).") from error
        raise FlashMoEError(f"target='cuda': CUDA cannot be used here ({text}).") from error
    if count == 0:
        raise FlashMoEError("target='cuda': the NVIDIA driver finds no GPU.")
