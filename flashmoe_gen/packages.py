"""The optional packages: what is installed, how to install what is not, and CuPy's import with its traps."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shlex
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from .errors import FlashMoEError, UnsupportedError

logger = logging.getLogger("flashmoe_gen")

# NVSHMEM and its Python binding that were tested together, by extra. pyproject.toml pins the same.
NVSHMEM_PAIRS = {
    "ep-cu12": {"nvshmem4py-cu12": "0.4.1", "nvidia-nvshmem-cu12": "3.4.5"},
    "ep-cu13": {"nvshmem4py-cu13": "0.4.1", "nvidia-nvshmem-cu13": "3.4.5"},
}
_DISTRIBUTION = "flashmoe_gen"
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")
_OWN_EXTRAS = re.compile(r"flashmoe[-_]gen\s*\[([\w.,\s-]+)\]", re.IGNORECASE)
_importing = threading.RLock()


def version(distribution: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str) -> list[str]:
    """What an extra of this package asks for, as its metadata tell; empty when they are not installed."""
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on sys.path
        return []
    found = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if (wanted := _EXTRA.search(marker)) and wanted[1] == extra:
            own = _OWN_EXTRAS.match(requirement)
            found += [r for name in own[1].split(",") for r in requirements(name.strip())] if own else [requirement]
    return found


def pip_command(extra: str) -> str:
    """The command that installs an extra. It names the packages: ``pip install flashmoe_gen[...]`` finds no index entry.

    Args:
        extra: ``"cu12"``, ``"cu13"``, ``"ep-cu12"`` or ``"ep-cu13"``.
    """
    wanted = requirements(extra)
    return shlex.join(["pip", "install", *wanted]) if wanted else f'pip install -e ".[{extra}]"'


def advice(*extras: str) -> str:
    """How to get CuPy and NVRTC, in words: for the CUDA version of the CuPy that is here, else for each."""
    here = [extra for extra in ("cu12", "cu13") if version(f"cupy-cuda{extra[2:]}x")]
    return " or ".join(f"`{pip_command(extra)}` (CUDA {extra[2:]})" for extra in extras or here or ("cu12", "cu13"))


def import_cupy(module: str = "cupy") -> Any:
    """Import CuPy, or a module of it.

    CuPy makes a cache folder of its own while it is imported, and dies where it cannot: it gets a temporary one then.

    Raises:
        UnsupportedError: CuPy is not installed; names the command that installs it.
        FlashMoEError: CuPy is installed, but its import fails; names what failed.
    """
    with _importing:
        if importlib.util.find_spec("cupy") is None:
            raise UnsupportedError(f"CuPy is not installed: {advice()}.")
        _give_cupy_a_folder()
        try:
            return importlib.import_module(module)
        except Exception as error:  # whatever: broken libraries raise what they like
            reason = f"{type(error).__name__}: {error}"
            raise FlashMoEError(f"CuPy is installed, but cannot be imported: {reason}") from error


def check_nvshmem() -> str:
    """Name the installed NVSHMEM and its Python binding.

    Raises:
        UnsupportedError: they are not installed, or are not the pair that was tested; names both.
    """
    # With both here, the one of the CuPy that is here.
    for extra, pair in sorted(NVSHMEM_PAIRS.items(), key=lambda item: not version(f"cupy-cuda{item[0][-2:]}x")):
        found = {name: version(name) for name in pair}
        if not any(found.values()):
            continue
        if found != pair:
            here = " with ".join(f"{name} {found[name] or '(not installed)'}" for name in pair)
            tested = " with ".join(f"{name} {number}" for name, number in pair.items())
            raise UnsupportedError(f"{here} was not tested. Install {tested}: `{pip_command(extra)}`.")
        return " with ".join(f"{name} {number}" for name, number in pair.items())
    commands = " or ".join(f"`{pip_command(extra)}`" for extra in NVSHMEM_PAIRS)
    raise UnsupportedError(f"NVSHMEM is not installed: {commands}.")


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written to; it is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.lru_cache(maxsize=1)
def _give_cupy_a_folder() -> None:
    wanted = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    if not wanted.startswith("~") and is_writable(
        Path(wanted)
    ):  # "~": nobody knows the home, and CuPy makes a folder "~"
        return
    try:
        folder = tempfile.mkdtemp(prefix="flashmoe_gen-cupy-")
    except OSError as error:
        raise FlashMoEError(
            f"CuPy's cache folder {wanted} cannot be written, nor can a temporary one: {error}. "
            "Set CUPY_CACHE_DIR to a writable directory."
        ) from error
    logger.info("CuPy's cache folder %s cannot be written; CuPy uses %s in this process", wanted, folder)
    os.environ["CUPY_CACHE_DIR"] = folder
    atexit.register(_remove_folder, folder, os.getpid())


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
