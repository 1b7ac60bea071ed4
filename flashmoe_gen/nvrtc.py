"""NVRTC: which build of it is here, and from CUDA C++ to a cubin. CuPy loads it; no GPU and no driver are needed."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import packages
from .errors import CompileError, FlashMoEError, SpecError, UnsupportedError

FLAGS = ("-std=c++17", "--ptxas-options=-v")
_INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION
_BUILD = re.compile(r"Build ID: (\S+).*?\bV(\d+(?:\.\d+)+)", re.DOTALL)
# What ptxas says, without failing, when it ignores setmaxnreg or puts wgmma in series: such a kernel is slow or stuck.
_IGNORED = re.compile(r"^.*(?:\bC75\d\d\b|setmaxnreg.*ignored|ignored.*setmaxnreg).*$", re.MULTILINE | re.IGNORECASE)
_ARCH_OPTIONS = ("-arch", "--gpu-architecture")
_RELOCATABLE = ("-rdc", "--relocatable-device-code")
_OTHER_OUTPUT = {"-dc", "--device-c", "-dlto", "--dlink-time-opt", "-optix-ir", "--optix-ir"}
_loading = threading.Lock()


class RefusedError(Exception):
    """A compiler ran, and its result cannot be used.

    Attributes:
        reason: the beginning of a sentence that ends with the kernel's name and arch.
        log: what the compiler printed.
    """

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(log)
        self.reason = reason
        self.log = log


@dataclass(frozen=True)
class Nvrtc:
    """The NVRTC that this process has loaded.

    Attributes:
        module: CuPy's binding.
        version: ``"NVRTC 13.2.86"``, as its package counts.
        build: NVIDIA's number of the build, ``"CL-36037853"``; ``"UNKNOWN"`` in some.
    """

    module: Any
    version: str
    build: str

    @property
    def identity(self) -> str:
        """The part of the cache key that stands for this compiler; another build has another one."""
        return " ".join([self.version, self.build, *FLAGS])


def load() -> Nvrtc:
    """Load NVRTC, once per process.

    Raises:
        CompileError: CuPy or NVRTC is missing, or cannot be loaded.
    """
    with _loading:
        return _load()


@lru_cache(maxsize=1)
def _load() -> Nvrtc:
    try:
        module = packages.import_cupy("cupy.cuda").nvrtc
    except FlashMoEError as error:
        raise CompileError(f"Compiling for a GPU needs CuPy and NVRTC. {error}") from error
    try:
        major, minor = module.getVersion()  # CuPy loads libnvrtc at the first call
    except (ImportError, OSError, RuntimeError) as error:
        raise CompileError(
            f"Compiling for a GPU needs NVRTC, which CuPy cannot load. Install it with {packages.advice()}. "
            f"({type(error).__name__}: {error})"
        ) from error
    # getVersion() is the same for many builds that make other code. The header of any PTX tells them apart, wherever
    # the library comes from: the package, a toolkit, conda.
    try:
        program = module.createProgram("", "version.cu", (), ())
        try:
            module.compileProgram(program, ())
            found = _BUILD.search(_decoded(module.getPTX(program)))
        finally:
            module.destroyProgram(program)
    except RuntimeError as error:
        raise CompileError(f"NVRTC {major}.{minor} is installed, but compiles nothing: {error}.") from error
    if not found:
        raise CompileError(f"NVRTC {major}.{minor} does not tell its build: its PTX names no compiler.")
    return Nvrtc(module, f"NVRTC {found[2]}", found[1])


def compile_program(text: str, *, file_name: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compile one text; return the cubin and the log, which has the resources that ptxas reports.

    Raises:
        SpecError: an option contradicts ``arch``, or asks for another output.
        UnsupportedError: this NVRTC does not know the architecture.
        CompileError: CuPy or NVRTC cannot be loaded.
        RefusedError: NVRTC refused the text, or ptxas ignored a part of it.
    """
    check_options(options, arch)
    nvrtc = load()
    program = nvrtc.module.createProgram(text, file_name, (), ())
    try:
        nvrtc.module.compileProgram(program, (f"-arch={arch}", *FLAGS, *options))
        data = nvrtc.module.getCUBIN(program) + b"\0"  # CuPy drops the last byte; CUDA's tools refuse a file without it
        log = _decoded(nvrtc.module.getProgramLog(program))
    except RuntimeError as error:  # NVRTCError is one
        log = _decoded(nvrtc.module.getProgramLog(program))
        if getattr(error, "status", None) == _INVALID_OPTION and "gpu-architecture" in log:
            raise UnsupportedError(
                f"{nvrtc.version} cannot compile for {arch!r}. Install a newer one: {packages.advice('cu13')}."
            ) from error
        raise RefusedError(f"{nvrtc.version} refused", log or str(error)) from error
    finally:
        nvrtc.module.destroyProgram(program)
    if ignored := _IGNORED.search(log):
        line = ignored[0].strip()
        raise RefusedError(f"ptxas of {nvrtc.version} did not do what the text asks for ({line}) in", log)
    return data, log


def check_options(options: tuple[str, ...], arch: str) -> None:
    """Refuse options that NVRTC would take, and that change what comes out, or for which GPU.

    Raises:
        SpecError: names the option.
    """
    words = iter(options)
    for option in map(str.strip, words):
        name, equals, value = option.partition("=")
        if name in _OTHER_OUTPUT:
            raise SpecError(f"options={option!r} is not valid. Must leave the output a cubin without relocatable code.")
        if name not in (*_ARCH_OPTIONS, *_RELOCATABLE):
            continue
        value = (value if equals else next(words, "")).strip()
        wanted = arch if name in _ARCH_OPTIONS else "false"
        if value != wanted:  # NVRTC takes a part of the second -arch; -rdc=true makes setmaxnreg void
            raise SpecError(f"options={name}={value} is not valid for arch={arch!r}. Must be {wanted}, or left out.")


def _decoded(text: str | bytes) -> str:
    return (text if isinstance(text, str) else text.decode(errors="replace")).strip("\0\n ")
