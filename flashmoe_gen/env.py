"""The environment variables the package reads; nothing else in the package touches ``os.environ`` for settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import platformdirs

from .errors import CacheError, SpecError

MIN_TIMEOUT_S, MAX_TIMEOUT_S = 1e-9, 1e9  # kernels count nanoseconds in 64 bits: a deadline is no 0, and no overflow
MIN_SECRET = 16  # characters
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise SpecError(f"{name}={value!r} is not valid. Must be 0 or 1.")


def expand(name: str, value: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~user`` replaced; raises ``SpecError`` naming the value when there is no such folder."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # no home directory, or no such user
        raise SpecError(f"{name}={os.fspath(value)!r} is not valid: {error} Name the folder without '~'.") from error


def _folder(name: str) -> Path | None:
    value = os.environ.get(name)
    return expand(name, value) if value else None


def cache_dir() -> Path:
    """``FLASHMOE_CACHE_DIR``: where compiled kernels are kept; default: the user's cache directory.

    Raises:
        SpecError: the value begins with ``~user``, and there is no such user.
        CacheError: it is not set, and the user has no home directory.
    """
    if folder := _folder("FLASHMOE_CACHE_DIR"):
        return folder
    try:
        default = Path(platformdirs.user_cache_dir("flashmoe_gen", appauthor=False))
        reason = f"HOME={os.environ.get('HOME')!r}, which gives {default}"
    except (RuntimeError, OSError) as error:
        default, reason = Path(), str(error)
    if not default.is_absolute():
        raise CacheError(f"The user has no home directory for the kernel cache ({reason}). Set FLASHMOE_CACHE_DIR.")
    return default


def cache_trust() -> str:
    """``FLASHMOE_CACHE_TRUST``: who may have written a kernel that is loaded: ``owner`` (and root), ``group`` or ``all``."""
    value = os.environ.get("FLASHMOE_CACHE_TRUST", "").strip().lower() or "owner"
    if value not in ("owner", "group", "all"):
        raise SpecError(f"FLASHMOE_CACHE_TRUST={value!r} is not valid. Must be 'owner', 'group' or 'all'.")
    return value


def timeout_s() -> float:
    """``FLASHMOE_TIMEOUT_S``: deadline of a wait inside a kernel, in seconds; 0 turns it off."""
    return _seconds("FLASHMOE_TIMEOUT_S", os.environ.get("FLASHMOE_TIMEOUT_S", ""), 60.0)


def init_timeout_s() -> float:
    """``FLASHMOE_INIT_TIMEOUT_S``: how long a process waits in ``comm.init`` for the others, in seconds; 0: for ever."""
    return _seconds("FLASHMOE_INIT_TIMEOUT_S", os.environ.get("FLASHMOE_INIT_TIMEOUT_S", ""), 300.0)


@lru_cache(maxsize=8)  # every call asks
def _seconds(name: str, text: str, default: float) -> float:
    text = text.strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if value != 0 and not MIN_TIMEOUT_S <= value <= MAX_TIMEOUT_S:
        raise SpecError(
            f"{name}={text!r} is not valid. Must be a number of seconds >= 0 (0 = no deadline): "
            f"0, or from {MIN_TIMEOUT_S:.0e} to {MAX_TIMEOUT_S:.0e}."
        )
    return value


class Secret(bytes):
    """Bytes that are not shown."""

    def __repr__(self) -> str:
        return "(set)"

    __str__ = __repr__


def secret() -> Secret | None:
    """``FLASHMOE_SECRET``: what the processes of a job know and others do not; ``None``: nothing."""
    value = os.environ.get("FLASHMOE_SECRET", "")
    if 0 < len(value) < MIN_SECRET:
        raise SpecError(f"FLASHMOE_SECRET has {len(value)} characters. Must have {MIN_SECRET} or more.")
    return Secret(os.fsencode(value)) if value else None


def target() -> str | None:
    """``FLASHMOE_TARGET``: the target a layer uses when none is given: ``host`` or ``cuda``."""
    value = os.environ.get("FLASHMOE_TARGET", "").strip().lower()
    if value not in ("", "host", "cuda"):
        raise SpecError(f"FLASHMOE_TARGET={value!r} is not valid. Must be 'host' or 'cuda'.")
    return value or None


def keep_source() -> Path | None:
    """``FLASHMOE_KEEP_SOURCE``: a folder that gets a copy of the source of every kernel that is compiled or looked up."""
    return _folder("FLASHMOE_KEEP_SOURCE")


def no_jit() -> bool:
    """``FLASHMOE_NO_JIT``: a cache miss raises ``CacheError`` instead of compiling."""
    return _flag("FLASHMOE_NO_JIT")


def log_level() -> str:
    """``FLASHMOE_LOG``: level of the ``flashmoe_gen`` logger: debug, info, warning or error."""
    value = os.environ.get("FLASHMOE_LOG", "").strip().lower() or "warning"
    if value not in ("debug", "info", "warning", "error"):
        raise SpecError(f"FLASHMOE_LOG={value!r} is not valid. Must be 'debug', 'info', 'warning' or 'error'.")
    return value


VARIABLES: dict[str, Callable[[], object]] = {
    "FLASHMOE_CACHE_DIR": cache_dir,
    "FLASHMOE_CACHE_TRUST": cache_trust,
    "FLASHMOE_TIMEOUT_S": timeout_s,
    "FLASHMOE_INIT_TIMEOUT_S": init_timeout_s,
    "FLASHMOE_SECRET": secret,
    "FLASHMOE_TARGET": target,
    "FLASHMOE_NO_JIT": no_jit,
    "FLASHMOE_KEEP_SOURCE": keep_source,
    "FLASHMOE_LOG": log_level,
}


def validate() -> None:
    """Read all of them, so that a wrong value is found before any work.

    Raises:
        SpecError: a value is not valid; names the variable.
    """
    for read in VARIABLES.values():
        with suppress(CacheError):  # no home directory: whoever needs the cache says so
            read()
