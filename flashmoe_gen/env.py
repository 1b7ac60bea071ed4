"""The environment variables the package reads; nothing else in the package touches ``os.environ`` for settings."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from .errors import SpecError

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise SpecError(f"{name}={value!r} is not valid. Must be 0 or 1.")


def cache_dir() -> Path:
    """``FLASHMOE_CACHE_DIR``: where compiled kernels are kept."""
    value = os.environ.get("FLASHMOE_CACHE_DIR")
    return Path(value).expanduser() if value else Path(platformdirs.user_cache_dir("flashmoe_gen", appauthor=False))


def timeout_s() -> float:
    """``FLASHMOE_TIMEOUT_S``: deadline of a wait inside a kernel, in seconds; 0 turns it off."""
    text = os.environ.get("FLASHMOE_TIMEOUT_S", "60")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SpecError(f"FLASHMOE_TIMEOUT_S={text!r} is not valid. Must be a number of seconds >= 0 (0 = no deadline).")
    return value


def target() -> str | None:
    """``FLASHMOE_TARGET``: the target a layer uses when none is given: ``host`` or ``cuda``."""
    value = os.environ.get("FLASHMOE_TARGET")
    if value not in (None, "", "host", "cuda"):
        raise SpecError(f"FLASHMOE_TARGET={value!r} is not valid. Must be 'host' or 'cuda'.")
    return value or None


def keep_source() -> Path | None:
    """``FLASHMOE_KEEP_SOURCE``: a folder that gets a copy of the source of every kernel that is compiled or looked up."""
    value = os.environ.get("FLASHMOE_KEEP_SOURCE")
    return Path(value).expanduser() if value else None


def no_jit() -> bool:
    """``FLASHMOE_NO_JIT``: a cache miss raises ``CacheError`` instead of compiling."""
    return _flag("FLASHMOE_NO_JIT")


def log_level() -> str:
    """``FLASHMOE_LOG``: level of the ``flashmoe_gen`` logger: debug, info, warning or error."""
    value = os.environ.get("FLASHMOE_LOG", "warning").strip().lower()
    if value not in ("debug", "info", "warning", "error"):
        raise SpecError(f"FLASHMOE_LOG={value!r} is not valid. Must be 'debug', 'info', 'warning' or 'error'.")
    return value
