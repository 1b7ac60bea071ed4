"""Compiling for the host, the compiler's identity, and every way in which a compiler can be missing or refuse."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe_gen import arch as arch_module
from flashmoe_gen import compile as compile_module
from flashmoe_gen import nvrtc, packages
from flashmoe_gen.compile import (
    compile_text,
    compiler_identity,
    file_stem,
    find_host_compiler,
    runs_here,
    slow_first_use,
    terminate_running,
)
from flashmoe_gen.cubin import logged_spill_bytes, usage
from flashmoe_gen.errors import CompileError, FlashMoEError, SpecError, UnsupportedError

GOOD = 'extern "C" int answer() { return 42; }\n'
BAD = 'extern "C" int answer() { return fourty_two; }\n'

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    compile_module._version.cache_clear()
    nvrtc._load.cache_clear()
    yield tmp_path / "cache"
    nvrtc._load.cache_clear()  # a test may have loaded a false one


def no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_host_image_loads_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flashmoe_gen"):
        image = compile_text(GOOD, name="answer", arch="host")
    assert "compiling answer for host" in caplog.text
    assert (image.registers, image.spill_bytes, image.shared_bytes) == (0, 0, 0)
    assert image.compiler == compiler_identity("host") and image.seconds > 0
    library = tmp_path / "answer.so"
    library.write_bytes(image.data)
    assert ctypes.CDLL(str(library)).answer() == 42


@needs_compiler
def test_host_image_is_reproducible_and_holds_no_path() -> None:
    first, second = (compile_text(GOOD, name="answer", arch="host").data for _ in range(2))
    assert first == second
    assert b"/tmp/" not in first


@needs_compiler
def test_options_come_after_the_packages_own() -> None:
    text = "#ifndef WANTED\n#error not wanted\n#endif\n" + GOOD
    assert compile_text(text, name="answer", arch="host", options=("-DWANTED",)).data


@needs_compiler
def test_refused_source_is_kept_and_the_next_call_works(cache_dir: Path) -> None:
    with pytest.raises(CompileError, match="refused answer for host") as caught:
        compile_text(BAD, name="answer", arch="host")
    assert "fourty_two" in caught.value.log
    assert caught.value.source_path == cache_dir / "failed" / "answer.cpp"
    assert caught.value.source_path.read_text() == BAD
    assert compile_text(GOOD, name="answer", arch="host").data


@needs_compiler
def test_refused_source_is_kept_elsewhere_when_the_cache_is_unwritable(cache_dir: Path) -> None:
    cache_dir.write_text("a file, not a folder")
    with pytest.raises(CompileError) as caught:
        compile_text(BAD, name="answer", arch="host")
    kept = caught.value.source_path
    assert kept is not None and kept.read_text() == BAD
    shutil.rmtree(kept.parent)


@needs_compiler
def test_unwritable_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
        with pytest.raises(CompileError, match="answer cannot be compiled with"):
            compile_text(GOOD, name="answer", arch="host")
    assert compile_text(GOOD, name="answer", arch="host").data


def test_no_compiler_names_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        no_compilers(patch)
        for call in (find_host_compiler, lambda: compile_text(GOOD, name="answer", arch="host")):
            with pytest.raises(CompileError) as caught:
                call()
            for word in ("$CXX (not set)", "g++", "clang++", "apt install g++", "pip install ziglang"):
                assert word in str(caught.value)
    if shutil.which("g++"):
        assert compile_text(GOOD, name="answer", arch="host").data


@needs_compiler
def test_cxx_is_first_and_may_carry_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = script(tmp_path / "my++", 'exec g++ "$@"')
    monkeypatch.setenv("CXX", f"{own} -DANSWER=42")
    compiler = find_host_compiler()
    assert compiler.command == (own, "-DANSWER=42")
    assert "-DANSWER=42" in compiler.identity and str(tmp_path) not in compiler.identity
    assert compile_text('extern "C" int f() { return ANSWER; }', name="f", arch="host").data


@needs_compiler
@pytest.mark.parametrize("value", ["absent-compiler", "absent-ccache g++", "'open quote", "/absent/g++", "''", "/tmp"])
def test_cxx_that_is_no_program_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler would be a surprise: whoever sets CXX wants this one."""
    monkeypatch.setenv("CXX", value)
    for call in (find_host_compiler, lambda: compile_text(GOOD, name="answer", arch="host")):
        with pytest.raises(CompileError, match="cannot be used: there is no program") as caught:
            call()
        assert f"CXX={value!r}" in str(caught.value)


@needs_compiler
@pytest.mark.parametrize("value", ["", "  "])
def test_blank_cxx_is_not_set(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", value)
    assert find_host_compiler().command[0] in ("g++", "clang++")


@needs_compiler
def test_cxx_may_be_a_wrapper_with_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = script(tmp_path / "ccache", 'exec "$@"')
    plain = find_host_compiler()
    for prefix in (launcher, f"env A=1 {launcher}", f"{launcher} {launcher}"):
        monkeypatch.setenv("CXX", f"{prefix} {plain.command[0]}")
        compiler = find_host_compiler()
        assert compiler.version == plain.version and str(tmp_path) not in compiler.identity
        assert compile_text(GOOD, name="answer", arch="host").data


@needs_compiler
def test_arguments_of_cxx_are_in_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = set()
    for value in ("g++", "g++ -DA=1", "g++ -D A=2", "g++ -D A=3"):
        monkeypatch.setenv("CXX", value)
        identities.add(compiler_identity("host"))
    assert len(identities) == 4


@needs_compiler
@pytest.mark.parametrize("place", ["relative CXX", "path with a space", "relative PATH"])
def test_where_the_compiler_is(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my tools"
    folder.mkdir()
    real = shutil.which("g++")
    script(folder / "my++", f'exec {real} "$@"')
    monkeypatch.chdir(folder)
    if place == "relative PATH":
        monkeypatch.setenv("PATH", f".{os.pathsep}{os.environ['PATH']}")
    value = {"relative CXX": "./my++", "path with a space": str(folder / "my++"), "relative PATH": "my++"}[place]
    monkeypatch.setenv("CXX", value)
    assert find_host_compiler().command == (value,)
    assert compile_text(GOOD, name="answer", arch="host").data


def test_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken++", "echo no licence; exit 3"))
    with pytest.raises(CompileError, match="does not answer --version") as caught:
        find_host_compiler()
    assert "no licence" in caught.value.log
    script(tmp_path / "broken++", "echo mended 1.0")
    assert find_host_compiler().version == "mended 1.0"


def test_version_is_asked_once_per_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = tmp_path / "count"
    own = script(tmp_path / "my++", f'echo x >> {count}; echo "my++ $VERSION"; echo noise >&2')
    monkeypatch.setenv("CXX", own)
    for version in ("1.0", "1.1"):  # the file stays
        monkeypatch.setenv("VERSION", version)
        compile_module._version.cache_clear()  # as in a new process
        for _ in range(3):
            assert compiler_identity("host").startswith(f"my++ {version} ")
    assert count.read_text() == "x\nx\n"


def start(name: str) -> tuple[threading.Thread, list[BaseException]]:
    """Compile in a thread of its own, as ``compile --arch all`` does."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            compile_text(GOOD, name=name, arch="host")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.read_text().strip()


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def ends(process: str) -> bool:
    """Whether it is gone within seconds: it would sleep for a minute."""
    deadline = time.monotonic() + 120
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(process)


SLEEPER = 'case "$*" in *--version) echo v; exit;; esac; {trap} sleep 60 & echo $! > {pid}; touch "$TMPDIR/cc1.s"; wait'


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"], ids=["dies", "ignores SIGTERM"])
def test_running_compilers_can_be_ended(trap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid, temporary = tmp_path / "pid", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(compile_module, "_TERMINATE_S", 0.2)
    monkeypatch.setenv("CXX", script(tmp_path / "my++", SLEEPER.format(trap=trap, pid=pid)))
    thread, errors = start("answer")
    child = wait_for(pid)
    assert is_running(child) and list(temporary.iterdir())
    assert terminate_running() == 1
    thread.join(30)
    (error,) = errors
    assert isinstance(error, CompileError) and "was ended" in str(error) and error.source_path is None
    assert ends(child) and not list(temporary.iterdir())
    assert terminate_running() == 0


@needs_compiler
def test_ctrl_c_ends_the_compiler(tmp_path: Path) -> None:
    pid, temporary = tmp_path / "pid", tmp_path / "tmp"
    temporary.mkdir()
    own = script(tmp_path / "my++", SLEEPER.format(trap="", pid=pid))
    code = f"from flashmoe_gen.compile import compile_text; compile_text({GOOD!r}, name='answer', arch='host')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "CXX": own, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE
    )
    child = wait_for(pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert b"KeyboardInterrupt" in err
    assert ends(child) and not list(temporary.iterdir())


def test_only_zig_is_slow_at_first() -> None:
    for command in (compile_module._ZIG, ("/opt/zig", "c++"), ("python3", "-m", "ziglang", "c++")):
        assert "minute" in (slow_first_use(command) or "")
    assert slow_first_use(("g++",)) is None and slow_first_use(("ccache", "clang++")) is None


@pytest.mark.parametrize("home", ["absent", "a file", "fine", "set by the user"])
def test_zig_gets_a_folder_where_its_own_cannot_be_made(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_dir: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    file = tmp_path / "file"
    file.write_text("x")
    homes = {
        "absent": "/proc/absent",
        "a file": str(file),
        "fine": str(tmp_path / "home"),
        "set by the user": "/proc/x",
    }
    monkeypatch.setenv("HOME", homes[home])
    if home == "set by the user":
        monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "/somewhere")
    wanted = {} if home in ("fine", "set by the user") else {"ZIG_GLOBAL_CACHE_DIR": str(cache_dir / "zig")}
    assert compile_module._zig_folder() == wanted


def test_ziglang_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    no_compilers(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.0")
    for has_v3, flag in ((True, "-mcpu=x86_64_v3"), (False, "-mcpu=baseline")):
        monkeypatch.setattr(compile_module, "_has_x86_64_v3", lambda has_v3=has_v3: has_v3)
        compiler = find_host_compiler()
        assert compiler.command == (sys.executable, "-m", "ziglang", "c++")
        assert compiler.flags[-1] == flag
        assert compiler.identity.startswith("zig c++ 0.13.0 ") and " -m " not in compiler.identity


def test_cpu_level_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "my++", "echo my++ 1.0"))
    identities = []
    for has_v3 in (True, False):
        monkeypatch.setattr(compile_module, "_has_x86_64_v3", lambda has_v3=has_v3: has_v3)
        identities.append(compiler_identity("host"))
    with_v3, without = identities
    assert "-march=x86-64-v3" in with_v3 and "-march" not in without
    assert runs_here(without) and not runs_here(with_v3)  # this machine now has no v3
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert not runs_here(without)


def test_file_stem() -> None:
    assert file_stem("flashmoe_layer_bf16") == "flashmoe_layer_bf16"
    assert file_stem("../a b") == ".._a_b"
    assert len(file_stem("x" * 999)) == 100 and file_stem("") == "kernel"


@pytest.mark.parametrize("name", ["sm_70", "sm_90", "", "gpu"])
def test_unknown_arch(name: str) -> None:
    with pytest.raises(UnsupportedError, match="is not supported"):
        compile_text(GOOD, name="answer", arch=name)
    with pytest.raises(UnsupportedError, match="is not supported"):
        compiler_identity(name)


def test_importing_does_not_import_cupy() -> None:
    code = "import sys, flashmoe_gen.cache; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PTX = b"// Compiler Build ID: CL-1\n// Cuda compilation tools, release 12.2, V12.2.140\n// Based on NVVM 7.0.1\n"


def fake_nvrtc(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    class NVRTCError(RuntimeError):
        status = 5

    def refuse(program: object, options: tuple[str, ...]) -> None:
        if options:  # none: it is asked for its version
            raise NVRTCError("NVRTC_ERROR_INVALID_OPTION (5)")

    parts = {
        "NVRTCError": NVRTCError,
        "getVersion": lambda: (12, 2),
        "getPTX": lambda program: PTX,
        "createProgram": lambda *args: 1,
        "destroyProgram": lambda program: None,
        "compileProgram": refuse,
        "getProgramLog": lambda program: "nvrtc: error: invalid value for --gpu-architecture (-arch)\n\0",
    }
    module = SimpleNamespace(**{**parts, **changes})
    monkeypatch.setattr(packages, "import_cupy", lambda name: SimpleNamespace(nvrtc=module))
    nvrtc._load.cache_clear()


def test_missing_cupy_or_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_load() -> None:
        raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    cases: list[tuple[Exception | None, str]] = [
        (UnsupportedError("CuPy is not installed: `pip install x`."), "CuPy is not installed: `pip install x`"),
        (FlashMoEError("CuPy is installed, but cannot be imported: ..."), "is installed, but cannot be imported"),
        (None, "libnvrtc.so.12: cannot open"),
    ]
    for error, text in cases:
        with monkeypatch.context() as patch:
            fake_nvrtc(patch, getVersion=cannot_load)
            if error:
                patch.setattr(packages, "import_cupy", fail_with(error))
            with pytest.raises(CompileError, match="Compiling for a GPU needs") as caught:
                compile_text("", name="k", arch="sm_90a")
            assert text in str(caught.value)
            assert ("pip install" in str(caught.value)) == (error is None or "not installed" in str(error))


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def test_builds_of_nvrtc_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """13.2.78 and 13.2.86 both say 13.2, and some builds have no number."""
    identities = set()
    for build in ("CL-1\n// V13.2.78", "CL-2\n// V13.2.78", "UNKNOWN\n// V13.2.78", "UNKNOWN\n// V13.2.86"):
        fake_nvrtc(monkeypatch, getVersion=lambda: (13, 2), getPTX=lambda p, b=build: f"// Build ID: {b}\n".encode())
        identities.add(compiler_identity("sm_90a"))
        assert "NVRTC 13.2." in compiler_identity("sm_90a")
    assert len(identities) == 4
    fake_nvrtc(monkeypatch, getPTX=lambda program: b".version 9.2\n")
    with pytest.raises(CompileError, match="does not tell its build"):
        compiler_identity("sm_90a")


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
        "ptxas warning : Instruction 'setmaxnreg' is ignored",
    ],
)
def test_what_ptxas_ignored_is_an_error(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = f"ptxas info    : 0 bytes gmem\n{line}\nptxas info    : Used 168 registers\n"
    fake_nvrtc(
        monkeypatch, compileProgram=lambda *args: None, getCUBIN=lambda p: b"", getProgramLog=lambda p: log + "\0"
    )
    with pytest.raises(CompileError) as caught:
        compile_text("the text", name="k", arch="sm_90a")
    assert line in str(caught.value).split("\n")[0] and caught.value.log == log.strip()
    assert caught.value.source_path and caught.value.source_path.read_text() == "the text"


@pytest.mark.parametrize(
    "options,word",
    [
        (("-arch=sm_80",), "-arch=sm_80"),
        (("-arch", "sm_80"), "-arch=sm_80"),
        ((" --gpu-architecture=compute_90",), "--gpu-architecture=compute_90"),
        (("-DX", "--gpu-architecture", "sm_90"), "--gpu-architecture=sm_90"),
        (("-arch",), "-arch="),
        (("-rdc=true",), "-rdc=true"),
        (("-rdc", "true"), "-rdc=true"),
        (("--relocatable-device-code=true",), "--relocatable-device-code=true"),
        (("-dc",), "-dc"),
        (("--device-c",), "--device-c"),
        (("-dlto",), "-dlto"),
        (("--dlink-time-opt",), "--dlink-time-opt"),
        (("-optix-ir",), "-optix-ir"),
    ],
)
def test_options_that_contradict_ours(options: tuple[str, ...], word: str) -> None:
    with pytest.raises(SpecError, match="is not valid") as caught:
        compile_text("", name="k", arch="sm_90a", options=options)
    assert word in str(caught.value)


def test_options_that_agree() -> None:
    nvrtc.check_options(("-arch=sm_90a", "-rdc=false", "-maxrregcount=32", "-DARCH=sm_80", "-lineinfo"), "sm_90a")
    nvrtc.check_options(("--gpu-architecture", "sm_90a", "--relocatable-device-code", "false"), "sm_90a")


def test_nvrtc_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arch_module.ARCHS, "sm_999", arch_module.Arch("sm_999", "nvrtc", 0, 0))
    fake_nvrtc(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"NVRTC 12\.2\.140 cannot compile for 'sm_999'"):
        compile_text("", name="k", arch="sm_999")
    fake_nvrtc(monkeypatch, getProgramLog=lambda program: "nvrtc: error: unrecognized option --wrong")
    with pytest.raises(CompileError, match=r"NVRTC 12\.2\.140 refused k for sm_80"):
        compile_text("", name="k", arch="sm_80", options=("--wrong",))


def test_nvrtc_that_returns_rubbish(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(
        monkeypatch, compileProgram=lambda *args: None, getCUBIN=lambda p: b"rubbish", getProgramLog=lambda p: "\0"
    )
    with pytest.raises(CompileError, match="cannot be read"):
        compile_text("", name="k", arch="sm_80")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF\x02" + b"\0" * 200, b"\x7fELF\x02" + b"\xff" * 200])
def test_usage_of_rubbish(data: bytes) -> None:
    with pytest.raises(CompileError, match=f"The cubin \\({len(data)} bytes\\) cannot be read"):
        usage(data)


def test_logged_spills() -> None:
    line = "ptxas         .     848 bytes stack frame, 1340 bytes spill stores, 1468 bytes spill loads\n"
    assert logged_spill_bytes(line + "other\n" + line) == 2 * (1340 + 1468)
    assert logged_spill_bytes("") == 0
