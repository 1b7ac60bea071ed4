"""Compiling for the host, the compiler's identity, and every way in which a compiler can be missing or refuse."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe_gen import arch as arch_module
from flashmoe_gen import compile as compile_module
from flashmoe_gen.compile import compile_text, compiler_identity, file_stem, find_host_compiler, runs_here
from flashmoe_gen.cubin import logged_spill_bytes, usage
from flashmoe_gen.errors import CompileError, UnsupportedError

GOOD = 'extern "C" int answer() { return 42; }\n'
BAD = 'extern "C" int answer() { return fourty_two; }\n'

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    compile_module._version.cache_clear()
    return tmp_path / "cache"


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
@pytest.mark.parametrize("value", ["absent-compiler", "'open quote", "  "])
def test_unusable_cxx_falls_through(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", value)
    assert find_host_compiler().command[0] in ("g++", "clang++")
    assert ("is not a program" in caplog.text) == bool(value.strip())


def test_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken++", "echo no licence; exit 3"))
    with pytest.raises(CompileError, match="does not answer --version") as caught:
        find_host_compiler()
    assert "no licence" in caught.value.log
    script(tmp_path / "broken++", "echo mended 1.0")
    assert find_host_compiler().version == "mended 1.0"


def test_version_is_asked_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = tmp_path / "count"
    own = script(tmp_path / "my++", f"echo x >> {count}; echo my++ 1.0")
    monkeypatch.setenv("CXX", own)
    for _ in range(3):
        assert "my++ 1.0" in compiler_identity("host")
        compile_module._version.cache_clear()  # as in a new process
    assert count.read_text() == "x\n"
    script(tmp_path / "my++", f"echo x >> {count}; echo my++ 1.0.1")  # an update changes size or time
    assert "my++ 1.0.1" in compiler_identity("host")


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


def fake_nvrtc(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    class NVRTCError(RuntimeError):
        status = 5

    def refuse(program: object, options: tuple[str, ...]) -> None:
        raise NVRTCError("NVRTC_ERROR_INVALID_OPTION (5)")

    parts = {
        "NVRTCError": NVRTCError,
        "getVersion": lambda: (12, 2),
        "createProgram": lambda *args: 1,
        "destroyProgram": lambda program: None,
        "compileProgram": refuse,
        "getProgramLog": lambda program: "nvrtc: error: invalid value for --gpu-architecture (-arch)\n\0",
    }
    module = SimpleNamespace(**{**parts, **changes})
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(nvrtc=module))


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'cupy'"), RuntimeError("no libnvrtc"), OSError("cache")]
)
def test_missing_cupy_or_nvrtc(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise error

    for place in ("import", "load"):
        with monkeypatch.context() as patch:
            if place == "import":
                patch.setattr(importlib, "import_module", fail)
            else:
                fake_nvrtc(patch, getVersion=fail)
            with pytest.raises(CompileError) as caught:
                compile_text("", name="k", arch="sm_90a")
        for word in ('pip install "flashmoe_gen[cu12]"', 'pip install "flashmoe_gen[cu13]"', str(error)):
            assert word in str(caught.value)


def test_nvrtc_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arch_module.ARCHS, "sm_999", arch_module.Arch("sm_999", "sm80", 0, 0))
    fake_nvrtc(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"NVRTC 12\.2 cannot compile for 'sm_999'"):
        compile_text("", name="k", arch="sm_999")
    fake_nvrtc(monkeypatch, getProgramLog=lambda program: "nvrtc: error: unrecognized option --wrong")
    with pytest.raises(CompileError, match=r"NVRTC 12\.2 refused k for sm_80"):
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
