"""Launching host kernels: a shared library, one thread per role, all inside this process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..args import EXPLORER_STRUCTS
from ..cache import Cache, CompiledKernel
from ..errors import CommError, CompileError, FlashMoEError, SpecError
from ..render import render_parts
from .target import LaunchShape, Prepared, Target, loaded

_ALIGN = 256
_WAIT_MS = 50  # between two looks at whether somebody pressed Ctrl-C


def build_program(name: str) -> CompiledKernel:
    """Compile one of the host programs: ``"launcher"`` or ``"explorer"`` (cached)."""
    text = render_parts(["host/runtime.h", f"host/{name}.cpp"], {"structs": EXPLORER_STRUCTS})
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


def load_program(name: str) -> ctypes.CDLL:
    """Build one of the host programs and load it."""
    return loaded(lambda: build_program(name), lambda compiled: load_library(compiled.path))


@functools.lru_cache(maxsize=1)
def _launcher() -> ctypes.CDLL:
    library = load_program("launcher")
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    for name, result, *arguments in (
        ("flashmoe_new_run", pointer),
        ("flashmoe_start", ctypes.c_int, pointer, pointer, pointer, number, pointer),
        ("flashmoe_wait", ctypes.c_int, pointer, number),
        ("flashmoe_end_run", None, pointer),
        ("flashmoe_lose_word", None, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class HostMemory:
    """Memory that this process can use; ``array`` is the same memory as uint8."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.pointer = array.ctypes.data
        self.nbytes = array.nbytes

    @classmethod
    def zeros(cls, nbytes: int) -> HostMemory:
        """New memory. Raises :class:`CommError` when there is none."""
        try:
            raw = np.zeros(nbytes + _ALIGN, np.uint8)
        except MemoryError:
            raise CommError(f"This machine has no {nbytes} bytes of memory left.") from None
        start = -raw.ctypes.data % _ALIGN
        return cls(raw[start : start + nbytes])

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        self.array[offset : offset + nbytes] = value

    def read(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        return np.array(self.array[offset : offset + nbytes])


@dataclass(frozen=True)
class HostKernel:
    """A loaded host kernel.

    Attributes:
        compiled: what the cache says of it.
        entry: address of its C symbol.
        library: keeps the code mapped.
        max_workers: 0: any number of threads can run.
    """

    compiled: CompiledKernel
    entry: int
    library: ctypes.CDLL
    max_workers: int = 0

    @classmethod
    def load(cls, compiled: CompiledKernel) -> HostKernel:
        """Load the shared library of a compiled kernel; raises :class:`CompileError` when it cannot be loaded."""
        library = load_library(compiled.path)
        entry = ctypes.cast(getattr(library, compiled.name), ctypes.c_void_p).value
        assert entry is not None
        return cls(compiled, entry, library)


def _cores(ranks: int) -> int:
    """Threads for each of so many ranks of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(64, cores // ranks))


class HostTarget:
    """The CPU: kernels are shared libraries, a rank is a set of threads, launches return when the kernel has ended.

    Args:
        sharing: ranks of the communicator that share the cores, evenly.
    """

    name: Literal["host", "cuda"] = "host"
    arch = "host"
    device = "cpu"
    synchronous = True
    readable = True
    system_workers = 2  # the scheduler and the subscriber

    def __init__(self, sharing: int = 1) -> None:
        self.sharing = sharing

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, compiled: CompiledKernel, shape: LaunchShape) -> HostKernel:
        return HostKernel.load(compiled)

    def load_helpers(self) -> None:
        _launcher()

    def processors(self, kernel: Any) -> int:
        return _cores(self.sharing)

    def expected(self, shape: LaunchShape, sharing: int) -> tuple[int, int]:
        processors = _cores(sharing)
        return processors, processors + self.system_workers

    def workers(self, kernel: Any, processors: int) -> int:
        return processors + self.system_workers

    def router_workers(self, kernel: Any, tokens: int, wanted: int) -> int:
        return max(1, min(_cores(1), tokens))

    def allocate(self, nbytes: int) -> HostMemory:
        return HostMemory.zeros(nbytes)

    def upload(self, array: np.ndarray[Any, Any]) -> HostMemory:
        memory = HostMemory.zeros(array.nbytes)
        memory.array[:] = np.ascontiguousarray(array).view(np.uint8)
        return memory

    def record(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.zeros_like(array)

    def stream(self, given: Any, array: Any) -> Any:
        if given is not None:
            raise SpecError("stream= is not valid for target='host'.")
        return None

    def dlpack_stream(self, stream: Any) -> int:
        return -1

    def prepare(self, kernel: Any, args: np.ndarray[Any, Any]) -> Prepared:
        return Prepared(args)

    def launch(
        self,
        kernel: Any,
        prepared: Prepared,
        workers: int,
        stream: Any,
        stop: ctypes.c_uint32 | None = None,
    ) -> None:
        """Run the kernel to its end, or until ``stop`` is set; an interrupt (Ctrl-C) sets it.

        Raises:
            FlashMoEError: the system refused to start that many threads; nothing ran.
        """
        stop = ctypes.c_uint32() if stop is None else stop
        launcher = _launcher()
        run = launcher.flashmoe_new_run()
        if not run:
            raise FlashMoEError(f"{kernel.compiled.name} cannot be started: this machine has no memory left.")
        ended = False
        try:
            if launcher.flashmoe_start(run, kernel.entry, prepared.pointer, workers, ctypes.byref(stop)) != 0:
                ended = True
                raise FlashMoEError(
                    f"{kernel.compiled.name} needs {workers} threads; the system refused to start them."
                )
            while not ended:  # between two waits Python runs its signal handlers
                ended = launcher.flashmoe_wait(run, _WAIT_MS)
        finally:
            if not ended:
                stop.value = 1
            launcher.flashmoe_end_run(
                run
            )  # in one step: its threads use memory that is about to go, whatever signals come

    def interrupt(self, aborted: Sequence[int]) -> None:
        pass  # stop= is what ends a launch here

    def narrow_ids(self, pointer: int, count: int, to: int, experts: int, stream: Any) -> None:
        wide = np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(pointer))
        narrow = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(to))
        np.clip(wide, -1, experts, out=narrow, casting="unsafe")

    def follow(self, stream: Any, before: Any) -> None:
        pass  # a launch has ended when it returns

    def keep(self, stream: Any, owners: tuple[Any, ...]) -> None:
        pass

    def forget(self) -> None:
        pass

    def reaches(self, other: Target) -> str:
        if (self.name, self.device) == (other.name, other.device):
            return ""
        return f"The communicator's layers run on {other.device}; this one would run on {self.device}."

    def synchronize(self) -> None:
        pass


def lose_word(address: int | None) -> None:
    """Fault injection for tests: the signal word at this address is never delivered; ``None`` ends it."""
    _launcher().flashmoe_lose_word(address)
