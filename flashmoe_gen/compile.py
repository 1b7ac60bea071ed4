"""From source text to image bytes: a C++ compiler for the host, NVRTC for a GPU. Nothing is kept on disk here.

Neither a GPU nor a driver is needed, and CuPy is imported only when a GPU architecture is asked for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import FrameType

from . import cubin, env, nvrtc, packages, trust
from .arch import get_arch
from .errors import CacheError, CompileError
from .nvrtc import RefusedError

logger = logging.getLogger("flashmoe_gen")

# -ffp-contract=off: the host target must round as its reference does, whatever fused instructions the CPU has.
_HOST_FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
_V3_FLAG, _V3_FLAG_ZIG = "-march=x86-64-v3", "-mcpu=x86_64_v3"
_V3_FEATURES = {"avx2", "fma", "bmi2", "f16c", "movbe", "abm"}
_ZIG = (sys.executable or "python", "-m", "ziglang", "c++")
_TERMINATE_S = 1.0  # what a compiler gets to remove its files before it is killed


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
        words = () if self.command == _ZIG else self.command[1:]
        own = [word for word in words if word.startswith("-") or not shutil.which(word)]  # not the g++ of "ccache g++"
        return " ".join([self.version, _platform(), *own, *self.flags])


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
        SpecError: an option contradicts ``arch`` or asks for another output than a cubin.
        UnsupportedError: the architecture is unknown to the package or to the installed NVRTC.
        CompileError: the compiler is missing, or refused the text, or ignored a part of it (then ``log`` and
            ``source_path`` are set); or :func:`terminate_running` ended it.
    """
    target = get_arch(arch)
    logger.info("compiling %s for %s", name, arch)
    try:
        return _COMPILERS[target.compiler](text, name, arch, options)
    except RefusedError as refusal:
        path = _keep_source(text, file_stem(name) + target.source_suffix, keep_in)
        message = f"{refusal.reason} {name} for {arch}."
        raise CompileError(message, log=refusal.log, source_path=path) from refusal.__cause__


def compiler_identity(arch: str) -> str:
    """Name the compiler for an architecture: version, platform and flags, but no path, so that it fits a cache key.

    Raises:
        UnsupportedError: the architecture is unknown to the package.
        CompileError: there is no compiler for it on this machine.
    """
    return _IDENTITIES[get_arch(arch).compiler]()


def runs_here(identity: str) -> bool:
    """Whether this machine can load an image made by that compiler, as far as CPU and platform decide."""
    words = identity.split()
    if words[:1] == ["NVRTC"]:
        return True
    needs_v3 = _V3_FLAG in words or _V3_FLAG_ZIG in words
    return _platform() in words and (_has_x86_64_v3() or not needs_v3)


def find_host_compiler() -> HostCompiler:
    """Return ``$CXX`` if it is set, else the first of ``g++``, ``clang++`` and the ``ziglang`` package's ``zig c++``.

    ``CXX`` may have arguments, as in ``CXX="ccache g++"``.

    Raises:
        CompileError: none exists, ``CXX`` is no program, or the one found cannot tell its version.
    """
    # CXX belongs to the tool chain, not to this package, hence it is not in env.py.
    wanted = os.environ.get("CXX", "").strip()
    candidates: list[tuple[str, ...]] = [_words(wanted)] if wanted else [("g++",), ("clang++",)]
    if not wanted and importlib.util.find_spec("ziglang") is not None:
        candidates.append(_ZIG)
    for command in candidates:
        if program := shutil.which(command[0]):
            return HostCompiler(command, _version(command, os.path.abspath(program)), _HOST_FLAGS + _cpu_flags(command))
    if wanted:  # another compiler would be a surprise: whoever sets CXX wants this one
        raise CompileError(
            f"CXX={wanted!r} cannot be used: there is no program {candidates[0][0]!r}"
            f"{'' if os.sep in candidates[0][0] else ' on PATH'}. Set CXX to a C++20 compiler, or unset it."
        )
    raise CompileError(
        "No C++ compiler found. Looked for $CXX (not set), then g++ and clang++ on PATH, then the Python package "
        "ziglang. Install g++ with the system's package manager (for example `apt install g++`), "
        "or run `pip install ziglang`."
    )


def slow_first_use(command: tuple[str, ...]) -> str | None:
    """What to tell a user who waits for this compiler's first run; ``None`` if that takes no longer than the next."""
    return "zig c++ builds its own libraries at first use, a minute or two" if _is_zig(command) else None


def terminate_running() -> int:
    """End the compilers that run in other threads of this process, with what they started; return how many there were.

    Their :func:`compile_text` raises ``CompileError``; nothing of them is left behind. NVRTC cannot be ended.
    """
    with _running_lock:
        processes = list(_running)
        _terminated.update(processes)
    for process in processes:
        _signal(process, signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)
        _signal(process, signal.SIGKILL)
    return len(processes)


def file_stem(name: str) -> str:
    """Make a kernel's name fit for a file name on any system."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100] or "kernel"


def _compile_cpp(text: str, name: str, arch: str, options: tuple[str, ...]) -> Image:
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
                raise RefusedError(f"{compiler.version} refused", done.stdout or f"exit status {done.returncode}")
            data = Path(folder, f"{stem}.so").read_bytes()
    except OSError as error:
        raise CompileError(f"{name} cannot be compiled with {shlex.join(compiler.command)}: {error}.") from error
    return Image(data, done.stdout, compiler.identity, 0, 0, 0, seconds)


def _compile_nvrtc(text: str, name: str, arch: str, options: tuple[str, ...]) -> Image:
    start = time.perf_counter()
    data, log = nvrtc.compile_program(text, file_name=f"{file_stem(name)}.cu", arch=arch, options=options)
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


_COMPILERS = {"c++": _compile_cpp, "nvrtc": _compile_nvrtc}
_IDENTITIES = {"c++": lambda: find_host_compiler().identity, "nvrtc": lambda: nvrtc.load().identity}


_running: set[subprocess.Popen[str]] = set()
_terminated: set[subprocess.Popen[str]] = set()
_running_lock = threading.Lock()


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler to its end; what it started ends with it, also when an exception (Ctrl-C) ends the wait."""
    # Its temporary files go into the folder, which is removed whatever happens to the compiler.
    environment = {**os.environ, "LC_ALL": "C", **({"TMPDIR": folder} if folder else {})}
    if _is_zig(tuple(command)):
        environment |= _zig_folder()
    program = os.path.abspath(shutil.which(command[0]) or command[0])  # not relative to the folder, as PATH may be
    process: subprocess.Popen[str] | None = None
    try:
        with _without_interrupt(), _running_lock:
            process = subprocess.Popen(
                [program, *command[1:]],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if folder else subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            _running.add(process)
        out, err = process.communicate()
    except BaseException:
        if process:
            _signal(process, signal.SIGKILL)
            process.wait()
        raise
    finally:
        with _running_lock:
            ended = process in _terminated
            _terminated.difference_update({process})
            _running.difference_update({process})
    if ended:
        raise CompileError(f"{shlex.join(command[:1])} was ended before it had compiled.")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts: between its start and its name no one could end it."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a compiler and all it started: it leads a session, hence a group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _keep_source(text: str, file_name: str, folder: Path | None) -> Path | None:
    """Write a refused source into the folder, or into a new temporary one; ``None`` when neither can be written."""
    for is_temporary in (False, True):
        with suppress(OSError, CacheError):  # CacheError: no home directory
            if is_temporary:
                target = Path(tempfile.mkdtemp(prefix="flashmoe_gen-"))
            else:
                target = folder or env.cache_dir() / "failed"
            trust.make_folder(target)
            (target / file_name).write_text(text, encoding="utf-8")
            return target / file_name
    return None


def _words(command: str) -> tuple[str, ...]:
    if shutil.which(command):  # a path with spaces
        return (command,)
    try:
        return tuple(shlex.split(command))
    except ValueError:  # an open quote
        return (command,)


def _is_zig(command: tuple[str, ...]) -> bool:
    return "ziglang" in command or Path(command[0]).name == "zig"


def _zig_folder() -> dict[str, str]:
    """A folder for zig's own libraries where its default, below the home directory, cannot be written."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zig")
    if "ZIG_GLOBAL_CACHE_DIR" in os.environ or (default.is_absolute() and packages.is_writable(default)):
        return {}
    with suppress(CacheError):
        return {"ZIG_GLOBAL_CACHE_DIR": str(env.cache_dir().absolute() / "zig")}
    return {}


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


@lru_cache(maxsize=16)
def _version(command: tuple[str, ...], program: str) -> str:
    """Ask the command itself, once per process: the file of a wrapper stays when the compiler behind it changes."""
    if command == _ZIG:
        return f"zig c++ {metadata.version('ziglang')}"
    try:
        done = _run([*command, "--version"])
    except OSError as error:
        raise CompileError(f"The C++ compiler {shlex.join(command)} cannot be started: {error}.") from error
    line = done.stdout.partition("\n")[0].strip()
    if done.returncode != 0 or not line:
        log = done.stdout + done.stderr
        raise CompileError(f"The C++ compiler {shlex.join(command)} does not answer --version.", log=log)
    return line
