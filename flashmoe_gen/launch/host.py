"""Launching host kernels: a shared library, one thread per role, all inside this process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache import Cache, CompiledKernel
from ..errors import CompileError, FlashMoEError
from ..render import render_parts

SCHEDULER_THREADS = 2  # the scheduler and the subscriber of a rank


def default_processors(world_size: int) -> int:
    """Processor threads per rank that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(64, cores // world_size))


def build_program(name: str) -> CompiledKernel:
    """Compile one of the host programs: ``"launcher"`` or ``"explorer"`` (cached)."""
    text = render_parts(["host/runtime.h", f"host/{name}.cpp"], {})
    digest = hashlib.sha256(text.encode()).hexdigest()
    command = "flashmoe-gen compile --arch host"
    return Cache().build(text, name=f"flashmoe_{name}", arch="host", digest=digest, metadata={"command": command})


def load_library(path: os.PathLike[str]) -> ctypes.CDLL:
    """Load a shared library from the cache.

    Raises:
        CompileError: the machine cannot load it (built for another system, or a cache folder mounted noexec).
    """
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise CompileError(f"The host kernel {path} cannot be loaded: {error}") from error


@functools.lru_cache(maxsize=1)
def _launcher() -> ctypes.CDLL:
    library = load_library(build_program("launcher").path)
    library.flashmoe_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    library.flashmoe_run.restype = ctypes.c_int
    library.flashmoe_lose_word.argtypes = [ctypes.c_void_p]
    library.flashmoe_lose_word.restype = None
    return library


@dataclass(frozen=True)
class HostKernel:
    """A loaded host kernel.

    Attributes:
        compiled: what the cache says of it.
        entry: address of its C symbol.
        library: keeps the code mapped.
    """

    compiled: CompiledKernel
    entry: int
    library: ctypes.CDLL

    @classmethod
    def load(cls, compiled: CompiledKernel) -> HostKernel:
        library = load_library(compiled.path)
        entry = ctypes.cast(getattr(library, compiled.name), ctypes.c_void_p).value
        assert entry is not None
        return cls(compiled, entry, library)

    def launch(self, args: np.ndarray[Any, Any], threads: int) -> None:
        """Run the kernel to its end with ``threads`` threads; ``args`` is one packed argument struct.

        Raises:
            FlashMoEError: the system refused to start that many threads; nothing ran.
        """
        if _launcher().flashmoe_run(self.entry, args.ctypes.data, threads) != 0:
            raise FlashMoEError(f"{self.compiled.name} needs {threads} threads; the system refused to start them.")


def lose_word(address: int | None) -> None:
    """Fault injection for tests: the signal word at this address is never delivered; ``None`` ends it."""
    _launcher().flashmoe_lose_word(address)
