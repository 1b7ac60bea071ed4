"""From source text to image bytes: a C++ compiler for the host, NVRTC for a GPU. Nothing is cached here but versions.

Neither a GPU nor a driver is needed, and CuPy is imported only when a GPU architecture is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from . import cubin, env
from .arch import get_arch
from .errors import CompileError, UnsupportedError

logger = logging.getLogger("flashmoe_gen")

# -ffp-contract=off: the host target must round as its reference does, whatever fused instructions the CPU has.
_HOST_FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
_NVRTC_FLAGS = ("-std=c++17", "--ptxas-options=-v")
_V3_FLAG, _V3_FLAG_ZIG = "-march=x86-64-v3", "-mcpu=x86_64_v3"
_V3_FEATURES = {"avx2", "fma", "bmi2", "f16c", "movbe", "abm"}
_ZIG = (sys.executable or "python", "-m", "ziglang", "c++")
_INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION


@dataclass(frozen=True)
class Image:
    """A compiled kernel.

    Attributes:
        data: the bytes of a cubin, or of a shared library for the host.
        log: what the compiler printed.
        compiler: :func:`compiler_identity` of the compiler that made it.
        registers: 32-bit registers of one thread, the most of any kernel in the text; 0 on the host.
        spill_bytes: spill stores plus loads of one thread, summed over the kernels; 0 on the host.
        shared_bytes: static shared memory of one block, the most of any kernel; 0 on the host.
        seconds: wall-clock time of the compiler.
    """

    data: bytes
    log: str
    compiler: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float


@dataclass(frozen=True)
class HostCompiler:
    """The C++ compiler of the host target.

    Attributes:
        command: the program and its leading arguments, as found.
        version: first line of its ``--version``; holds no path.
        flags: what every compilation passes, the CPU level included.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]

    @property
    def identity(self) -> str:
        """The part of the cache key that stands for this compiler: version, platform and flags, without paths."""
        own_flags = [word for word in self.command[1:] if word.startswith("-") and word != "-m"]
        return " ".join([self.version, _platform(), *own_flags, *self.flags])


def compile_text(
    text: str, *, name: str, arch: str, options: tuple[str, ...] = (), keep_in: Path | None = None
) -> Image:
    """Compile one self-contained source text.

    Args:
        text: C++20 for the host, CUDA C++17 for a GPU.
        name: names the text in messages and in the log.
        arch: ``"host"`` or a key of :data:`flashmoe_gen.arch.ARCHS`.
        options: further compiler options, after the package's own.
        keep_in: folder that receives a refused source; default ``failed`` in the cache directory.

    Raises:
        UnsupportedError: the architecture is unknown to the package or to the installed NVRTC.
        CompileError: the compiler is missing, or refused the text (then ``log`` and ``source_path`` are set).
    """
    is_host = get_arch(arch).is_host
    logger.info("compiling %s for %s", name, arch)
    try:
        return _compile_host(text, name, options) if is_host else _compile_nvrtc(text, name, arch, options)
    except _RefusedError as refusal:
        path = _keep_source(text, file_stem(name) + (".cpp" if is_host else ".cu"), keep_in)
        message = f"{refusal.compiler} refused {name} for {arch}."
        raise CompileError(message, log=refusal.log, source_path=path) from refusal.__cause__


def compiler_identity(arch: str) -> str:
    """Name the compiler for an architecture: version, platform and flags, but no path, so that it fits a cache key.

    Raises:
        UnsupportedError: the architecture is unknown to the package.
        CompileError: there is no compiler for it on this machine.
    """
    if get_arch(arch).is_host:
        return find_host_compiler().identity
    return " ".join([_nvrtc_version(_nvrtc()), *_NVRTC_FLAGS])


def runs_here(identity: str) -> bool:
    """Whether this machine can load an image made by that compiler, as far as CPU and platform decide."""
    words = identity.split()
    if words[:1] == ["NVRTC"]:
        return True
    needs_v3 = _V3_FLAG in words or _V3_FLAG_ZIG in words
    return _platform() in words and (_has_x86_64_v3() or not needs_v3)


def find_host_compiler() -> HostCompiler:
    """Return the first of ``$CXX``, ``g++``, ``clang++`` and the ``ziglang`` package's ``zig c++`` that exists.

    Raises:
        CompileError: none exists, or the one found cannot tell its version.
    """
    # CXX belongs to the tool chain, not to this package, hence it is not in env.py.
    wanted = os.environ.get("CXX", "").strip()
    candidates: list[tuple[str, ...]] = [("g++",), ("clang++",)]
    if wanted:
        candidates.insert(0, _words(wanted))
        if not shutil.which(candidates[0][0]):
            logger.warning("CXX=%r is not a program; looking for another C++ compiler", wanted)
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append(_ZIG)
    for command in candidates:
        if shutil.which(command[0]):
            return HostCompiler(command, _version(command, _fingerprint(command)), _HOST_FLAGS + _cpu_flags(command))
    raise CompileError(
        f"No C++ compiler found. Looked for $CXX ({wanted or 'not set'}), then g++ and clang++ on PATH, then the "
        "Python package ziglang. Install g++ with the system's package manager (for example `apt install g++`), "
        "or run `pip install ziglang`."
    )


def file_stem(name: str) -> str:
    """Make a kernel's name fit for a file name on any system."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100] or "kernel"


class _RefusedError(Exception):
    """The compiler ran and refused the text."""

    def __init__(self, compiler: str, log: str) -> None:
        super().__init__(log)
        self.compiler = compiler
        self.log = log


def _compile_host(text: str, name: str, options: tuple[str, ...]) -> Image:
    compiler = find_host_compiler()
    stem = file_stem(name)
    try:
        with tempfile.TemporaryDirectory(prefix="flashmoe_gen-") as folder:
            Path(folder, f"{stem}.cpp").write_text(text, encoding="utf-8")
            # Relative names and the folder as working directory: no path gets into the image or the log.
            command = [*compiler.command, *compiler.flags, *options, "-o", f"{stem}.so", f"{stem}.cpp"]
            start = time.perf_counter()
            done = _run(command, folder)
            seconds = time.perf_counter() - start
            if done.returncode != 0:
                raise _RefusedError(compiler.version, done.stdout or f"exit status {done.returncode}")
            data = Path(folder, f"{stem}.so").read_bytes()
    except OSError as error:
        raise CompileError(f"{name} cannot be compiled with {shlex.join(compiler.command)}: {error}.") from error
    return Image(data, done.stdout, compiler.identity, 0, 0, 0, seconds)


def _compile_nvrtc(text: str, name: str, arch: str, options: tuple[str, ...]) -> Image:
    nvrtc = _nvrtc()
    version = _nvrtc_version(nvrtc)
    start = time.perf_counter()
    program = nvrtc.createProgram(text, f"{file_stem(name)}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}", *_NVRTC_FLAGS, *options))
        data = nvrtc.getCUBIN(program) + b"\0"  # CuPy drops the last byte; the CUDA tools refuse a file without it
        log = _clean(nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        log = _clean(nvrtc.getProgramLog(program))
        if error.status == _INVALID_OPTION and "gpu-architecture" in log:
            raise UnsupportedError(
                f"{version} cannot compile for {arch!r}. Install a newer NVRTC: "
                '`pip install -U nvidia-cuda-nvrtc-cu12`, or `pip install "flashmoe_gen[cu13]"` for CUDA 13.'
            ) from error
        raise _RefusedError(version, log or str(error)) from error
    finally:
        nvrtc.destroyProgram(program)
    seconds = time.perf_counter() - start
    kernels = cubin.usage(data).values()
    # The log is exact; the count from the ELF is there so that a change of the log's wording does not hide spills.
    spill_bytes = cubin.logged_spill_bytes(log) or 4 * sum(kernel.spill_instructions for kernel in kernels)
    return Image(
        data=data,
        log=log,
        compiler=compiler_identity(arch),
        registers=max((kernel.registers for kernel in kernels), default=0),
        spill_bytes=spill_bytes,
        shared_bytes=max((kernel.shared_bytes for kernel in kernels), default=0),
        seconds=seconds,
    )


def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cupy.cuda").nvrtc
        nvrtc.getVersion()  # CuPy loads libnvrtc at the first call
    except (ImportError, OSError, RuntimeError) as error:
        raise CompileError(
            'Compiling for a GPU needs CuPy and NVRTC: `pip install "flashmoe_gen[cu12]"` for CUDA 12 or '
            f'`pip install "flashmoe_gen[cu13]"` for CUDA 13. ({type(error).__name__}: {error})'
        ) from error
    return nvrtc


def _nvrtc_version(nvrtc: Any) -> str:
    return "NVRTC {}.{}".format(*nvrtc.getVersion())


def _clean(log: str) -> str:
    return log.strip("\0\n ")


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _keep_source(text: str, file_name: str, folder: Path | None) -> Path | None:
    """Write a refused source into the folder, or into a new temporary one; ``None`` when neither can be written."""
    for target in (folder or env.cache_dir() / "failed", None):
        try:
            target = target or Path(tempfile.mkdtemp(prefix="flashmoe_gen-"))
            target.mkdir(parents=True, exist_ok=True)
            (target / file_name).write_text(text, encoding="utf-8")
            return target / file_name
        except OSError:
            continue
    return None


def _words(command: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError:  # an open quote
        return (command,)


def _is_zig(command: tuple[str, ...]) -> bool:
    return "ziglang" in command or Path(command[0]).name == "zig"


def _platform() -> str:
    return f"{sys.platform}-{platform.machine()}"


def _cpu_flags(command: tuple[str, ...]) -> tuple[str, ...]:
    if _is_zig(command):  # zig's default is exactly this CPU: such an image need not run on its neighbours
        return (_V3_FLAG_ZIG if _has_x86_64_v3() else "-mcpu=baseline",)
    return (_V3_FLAG,) if _has_x86_64_v3() else ()


@lru_cache(maxsize=1)
def _has_x86_64_v3() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= _V3_FEATURES


def _fingerprint(command: tuple[str, ...]) -> str:
    """Identify the programs of a command by path, time and size, without running one."""
    parts = []
    for word in command:
        path = shutil.which(word)
        if path:
            real = os.path.realpath(path)
            stat = os.stat(real)
            parts.append(f"{real} {stat.st_mtime_ns} {stat.st_size}")
        else:
            parts.append(word)
    return "\n".join(parts)


@lru_cache(maxsize=16)
def _version(command: tuple[str, ...], fingerprint: str) -> str:
    if command == _ZIG:
        return f"zig c++ {metadata.version('ziglang')}"
    # Kept on disk too, so that a process that only loads cached kernels starts no other process.
    memo = env.cache_dir() / "compilers" / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    try:
        if known := memo.read_text(encoding="utf-8").strip():
            return known
    except (OSError, ValueError):
        pass
    version = _ask_version(command)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        draft = memo.with_name(f"{memo.name}.{os.getpid()}")
        draft.write_text(version, encoding="utf-8")
        os.replace(draft, memo)
    except OSError:
        pass  # a read-only cache: ask again next time
    return version


def _ask_version(command: tuple[str, ...]) -> str:
    try:
        done = _run([*command, "--version"])
    except OSError as error:
        raise CompileError(f"The C++ compiler {shlex.join(command)} cannot be started: {error}.") from error
    lines = done.stdout.split("\n")
    if done.returncode != 0 or not lines[0].strip():
        raise CompileError(f"The C++ compiler {shlex.join(command)} does not answer --version.", log=done.stdout)
    return lines[0].strip()
