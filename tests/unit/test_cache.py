"""The kernel cache: hits, damage, dead and concurrent builders, and folders that cannot be written."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flashmoe_gen import cache as cache_module
from flashmoe_gen import compile as compile_module
from flashmoe_gen import locks
from flashmoe_gen.cache import Cache, CompiledKernel
from flashmoe_gen.compile import Image
from flashmoe_gen.errors import CacheError, CompileError, UnsupportedError

TEXT = 'extern "C" int answer() { return 42; }\n'
COMMAND = "flashmoe-gen compile --preset tiny --arch host"

Patch = pytest.MonkeyPatch

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("CXX", "FLASHMOE_NO_JIT"):
        monkeypatch.delenv(name, raising=False)
    compile_module._version.cache_clear()
    return tmp_path / "cache"


FAKE = f"fake 1.0 {compile_module._platform()}"


class FakeCompiler:
    """Stands for any compiler: counts its calls, returns bytes that tell which call made them."""

    def __init__(self) -> None:
        self.identity = FAKE
        self.calls = 0
        self.delay = 0.0

    def compile(self, text: str, *, name: str, arch: str, keep_in: Path) -> Image:
        self.calls += 1
        time.sleep(self.delay)
        return Image(f"image {self.calls}".encode() * 50, "the log\nof it", self.identity, 40, 8, 1024, 0.25)


@pytest.fixture
def fake(monkeypatch: Patch) -> FakeCompiler:
    compiler = FakeCompiler()
    monkeypatch.setattr(cache_module, "compile_text", compiler.compile)
    monkeypatch.setattr(cache_module, "compiler_identity", lambda arch: compiler.identity)
    return compiler


def build(cache: Cache | None = None, text: str = TEXT, **changes: Any) -> CompiledKernel:
    arguments = {"name": "answer", "arch": "host", "digest": "d1", "metadata": {"command": COMMAND}}
    return (cache or Cache()).build(text, **{**arguments, **changes})


def unfinished(root: Path) -> list[Path]:
    return [*root.glob("*/.building-*"), *root.glob("*/.broken-*")]


def test_miss_then_hit(fake: FakeCompiler, root: Path) -> None:
    built = build()
    assert not built.from_cache and fake.calls == 1
    assert (built.registers, built.spill_bytes, built.shared_bytes, built.seconds) == (40, 8, 1024, 0.25)
    assert (built.compiler, built.log, built.image) == (FAKE, "the log\nof it", b"image 1" * 50)
    found = build(Cache(root))
    assert found == dataclasses.replace(built, from_cache=True) and fake.calls == 1
    files = " ".join(sorted(path.name for path in built.path.parent.iterdir()))
    assert files == "build.log kernel.so metadata.json source.cpp"
    assert built.path.parent.parent == root / "host" and built.path.parent.name.startswith("answer-")
    assert (built.path.parent / "source.cpp").read_text() == TEXT
    assert not unfinished(root)
    gpu = build(arch="sm_90a")
    assert gpu.path.name == "kernel.cubin" and (gpu.path.parent / "source.cu").exists()


def test_everything_that_matters_is_in_the_key(fake: FakeCompiler, monkeypatch: Patch) -> None:
    def paths() -> set[Path]:
        variants: list[dict[str, Any]] = [{}, {"text": TEXT + " "}, {"digest": "d2"}, {"arch": "sm_80"}]
        return {build(**variant).path for variant in variants}

    first = paths()
    fake.identity = "fake 1.1"
    second = paths()
    monkeypatch.setattr(cache_module, "_FORMAT", 2)
    assert len(first | second | paths()) == 12
    calls = fake.calls
    assert build(metadata={"command": "another"}).from_cache and fake.calls == calls


def test_entries_and_clear(fake: FakeCompiler, root: Path) -> None:
    cache = Cache()
    assert cache.path == root and cache.entries() == [] and cache.clear() == 0
    build(cache, name="beta")
    build(cache, name="alpha", arch="sm_90a")
    build(cache, name="alpha")
    damaged = build(cache, name="damaged").path.parent
    (damaged / "metadata.json").write_text("{}")
    (root / "failed").mkdir()
    (root / "failed" / "bad.cu").write_text("bad")
    mine = root / "host" / "my notes"
    mine.mkdir()
    entries = cache.entries()
    assert [(entry.arch, entry.name) for entry in entries] == [("host", "alpha"), ("host", "beta"), ("sm_90a", "alpha")]
    assert entries[0].metadata == {"command": COMMAND} and entries[0].digest == "d1"
    assert entries[0].size_bytes == 350 and 0 < entries[0].created <= time.time()
    assert cache.clear() == 4
    assert cache.entries() == [] and mine.is_dir() and not list((root / "failed").iterdir()) and not unfinished(root)
    assert not build(cache).from_cache


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(entry: Path, *names: str) -> None:
    for name in names:
        (entry / name).unlink()


def replace_by_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("x")


def change_metadata(entry: Path, **changes: Any) -> None:
    record = json.loads((entry / "metadata.json").read_text())
    (entry / "metadata.json").write_text(json.dumps({**record, **changes}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "image truncated": lambda entry: truncate(entry / "kernel.so"),
    "image empty": lambda entry: (entry / "kernel.so").write_bytes(b""),
    "image changed": lambda entry: flip(entry / "kernel.so"),
    "image missing": lambda entry: remove(entry, "kernel.so"),
    "metadata truncated": lambda entry: truncate(entry / "metadata.json"),
    "metadata empty": lambda entry: (entry / "metadata.json").write_bytes(b""),
    "metadata missing": lambda entry: remove(entry, "metadata.json"),
    "metadata not text": lambda entry: (entry / "metadata.json").write_bytes(b"\xff\xfe\x00"),
    "metadata a list": lambda entry: (entry / "metadata.json").write_text("[1]"),
    "metadata without values": lambda entry: (entry / "metadata.json").write_text("{}"),
    "metadata with null": lambda entry: change_metadata(entry, registers=None),
    "metadata of another key": lambda entry: change_metadata(entry, key="0" * 64),
    "log missing": lambda entry: remove(entry, "build.log"),
    "half written": lambda entry: remove(entry, "kernel.so", "metadata.json", "build.log"),
    "empty folder": lambda entry: remove(entry, *(path.name for path in entry.iterdir())),
    "a file in its place": replace_by_file,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_built_again(
    damage: str, fake: FakeCompiler, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = build()
    DAMAGE[damage](before.path.parent)
    again = build()
    assert not again.from_cache and fake.calls == 2 and again.path == before.path
    assert again.image == b"image 2" * 50
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "damaged" in warnings[0].getMessage() and warnings[0].name == "flashmoe_gen"
    assert build().from_cache and not unfinished(root)


@needs_gxx
def test_a_loaded_library_survives_damage_and_clear(root: Path) -> None:
    kernel = build()
    library = ctypes.CDLL(str(kernel.path))
    inode = kernel.path.stat().st_ino
    (kernel.path.parent / "metadata.json").unlink()
    again = build()
    assert again.path == kernel.path and again.path.stat().st_ino != inode and not again.from_cache
    assert Cache().clear() == 1
    assert library.answer() == 42
    with pytest.raises(CacheError, match="The image of answer cannot be read"):
        _ = kernel.image


@needs_gxx
def test_refused_source_leaves_no_entry(root: Path) -> None:
    with pytest.raises(CompileError) as caught:
        build(text="not C++")
    assert caught.value.source_path == root / "failed" / "answer.cpp"
    assert Cache().entries() == [] and not unfinished(root)
    assert ctypes.CDLL(str(build().path)).answer() == 42


def test_unknown_arch(root: Path) -> None:
    with pytest.raises(UnsupportedError, match="is not supported"):
        build(arch="../host")
    assert not root.exists()


def test_no_jit(fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FLASHMOE_NO_JIT", "1")
        with pytest.raises(CacheError, match="FLASHMOE_NO_JIT=1") as caught:
            build()
        assert COMMAND in str(caught.value) and str(root) in str(caught.value)
        assert fake.calls == 0 and not root.exists()
        with pytest.raises(CacheError, match="Build it with: flashmoe-gen compile"):
            build(metadata={})
    kernel = build()
    monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
    # Whatever the local compiler is, or says: it is not even looked for.
    monkeypatch.setattr(cache_module, "compiler_identity", fail_with(AssertionError("looked for a compiler")))
    assert build().from_cache
    with pytest.raises(CacheError, match="FLASHMOE_NO_JIT=1"):
        build(text=TEXT + " ")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "runs_here", lambda identity: identity != FAKE)  # of a CPU with more
        with pytest.raises(CacheError, match="FLASHMOE_NO_JIT=1"):
            build()
    truncate(kernel.path)
    with pytest.raises(CacheError, match="or is damaged there"):
        build()


def test_machine_without_a_compiler_uses_what_another_built(fake: FakeCompiler, monkeypatch: Patch) -> None:
    fake.identity = f"g++ 1.0 {compile_module._platform()} -O3"
    kernel = build()
    monkeypatch.setattr(cache_module, "compiler_identity", fail_with(CompileError("No C++ compiler found.")))
    assert build() == dataclasses.replace(kernel, from_cache=True)
    with pytest.raises(CompileError, match=r"No C\+\+ compiler"):
        build(text=TEXT + " ")
    monkeypatch.setattr(cache_module, "runs_here", lambda identity: False)
    with pytest.raises(CompileError, match=r"No C\+\+ compiler"):
        build()
    monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
    with pytest.raises(CacheError, match="Build it with"):
        build()


def test_a_file_in_place_of_the_folder(fake: FakeCompiler, root: Path) -> None:
    root.write_text("x")
    with pytest.raises(CacheError) as caught:
        build()
    for word in (str(root), "FLASHMOE_CACHE_DIR", "Not a directory"):
        assert word in str(caught.value)
    assert fake.calls == 0  # found before minutes are spent on compiling
    root.unlink()
    assert not build().from_cache


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["mkdir", "touch", "write_text", "write_bytes", "rename"])
def test_unwritable_or_full(number: int, step: str, fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os if step == "rename" else Path, step, fail_with(OSError(number, os.strerror(number))))
        with pytest.raises(CacheError) as caught:
            build()
    for word in (str(root), "FLASHMOE_CACHE_DIR", os.strerror(number)):
        assert word in str(caught.value)
    assert not unfinished(root)
    assert not build().from_cache and build().from_cache


@needs_gxx
def test_hit_in_a_read_only_cache_writes_nothing(monkeypatch: Patch, root: Path) -> None:
    kernel = build()
    compile_module._version.cache_clear()
    before = sorted(root.rglob("*"))
    for owner, step in ((Path, "mkdir"), (Path, "touch"), (Path, "write_text"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, step, fail_with(OSError(errno.EROFS, "read-only")))
    assert build() == dataclasses.replace(kernel, from_cache=True)
    assert sorted(root.rglob("*")) == before


def test_lost_race_without_a_lock_uses_the_winner(fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    """On a file system without locks two builders meet at the rename."""
    monkeypatch.setattr(fcntl, "flock", fail_with(OSError(errno.ENOLCK, "no locks")))
    slow = FakeCompiler()

    def compile_slowly(*args: Any, **kwargs: Any) -> Image:
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "compile_text", fake.compile)
            assert not build().from_cache  # the other builder finishes first
        return slow.compile(*args, **kwargs)

    fake.calls = 5
    monkeypatch.setattr(cache_module, "compile_text", compile_slowly)
    kernel = build()
    assert kernel.image == b"image 6" * 50 and not unfinished(root)


def test_leftovers_of_dead_builders_are_removed_by_age(fake: FakeCompiler, root: Path) -> None:
    old, new = root / "host" / ".building-answer-1", root / "host" / ".building-answer-2"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "kernel.so").write_text("half")
    os.utime(old, (0, 0))
    build()
    assert unfinished(root) == [new]


def test_threads_of_one_process_build_once(fake: FakeCompiler) -> None:
    fake.delay = 0.2
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: build(), range(8)))
    assert fake.calls == 1 and sum(not kernel.from_cache for kernel in kernels) == 1


BUILDER = f"""
from flashmoe_gen.cache import Cache
print(Cache().build({TEXT!r}, name="answer", arch="host", digest="d1", metadata=dict()).from_cache)
"""


def start_builder(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER],
        env={**os.environ, "TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wrapper(path: Path, body: str) -> str:
    """A g++ that runs ``body`` before it compiles, but not when it is asked for its version."""
    path.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) {body} ;; esac\nexec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


@needs_gxx
def test_many_processes_compile_once(tmp_path: Path, root: Path) -> None:
    count = tmp_path / "count"
    compiler = wrapper(tmp_path / "g++", f"echo x >> {count}; sleep 1;")
    builders = [start_builder(tmp_path, CXX=compiler) for _ in range(5)]
    answers = []
    for builder in builders:
        out, err = builder.communicate(timeout=120)
        assert builder.returncode == 0, err
        answers.append(out.strip())
    assert sorted(answers) == ["False"] + ["True"] * 4
    assert count.read_text() == "x\n" and len(Cache().entries()) == 1 and not unfinished(root)


@needs_gxx
def test_killed_builder_blocks_nobody(tmp_path: Path, root: Path, monkeypatch: Patch) -> None:
    started, again = tmp_path / "started", tmp_path / "again"
    compiler = wrapper(tmp_path / "g++", f"if [ ! -e {again} ]; then echo $$ >> {started}; sleep 60; fi;")
    builder = start_builder(tmp_path, CXX=compiler)
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started.exists() and builder.poll() is None
    again.touch()
    waiting = start_builder(tmp_path, CXX=compiler)
    time.sleep(0.5)
    assert waiting.poll() is None  # the lock is held
    builder.kill()  # its compiler lives on
    builder.communicate(timeout=120)
    out, err = waiting.communicate(timeout=120)
    os.killpg(int(started.read_text()), signal.SIGKILL)
    assert (waiting.returncode, out.strip()) == (0, "False"), err
    monkeypatch.setenv("CXX", compiler)
    compile_module._version.cache_clear()
    kernel = build()
    assert kernel.from_cache
    assert ctypes.CDLL(str(kernel.path)).answer() == 42


@needs_gxx
def test_warm_start_reads_and_compiles_nothing(monkeypatch: Patch) -> None:
    """A hit asks the compiler for its version, and reads the entry: 50 ms of a machine that does nothing else."""
    build()
    compile_module._version.cache_clear()  # as in a new process
    ran: list[list[str]] = []
    real = compile_module._run
    monkeypatch.setattr(compile_module, "_run", lambda command, *rest: ran.append(command) or real(command, *rest))
    assert build().from_cache and build().from_cache
    assert [command[1:] for command in ran] == [["--version"]]


LOCK_ERRORS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.ESTALE]


@pytest.mark.parametrize("number", LOCK_ERRORS, ids=errno.errorcode.get)
def test_file_systems_without_locks(number: int, root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(time, "sleep", fail_with(AssertionError("waited for a lock that does not work")))
    monkeypatch.setattr(fcntl, "flock", fail_with(OSError(number, os.strerror(number))))
    assert locks_held() == [False]


def locks_held() -> list[bool]:
    with locks.held(Cache().path / "locks" / "a.lock", wait_s=900, what="a kernel") as held:
        return [held]


@pytest.mark.parametrize("where", ["folder is a file", "file is a folder", "file is a link", "file cannot be opened"])
def test_locks_that_cannot_be_made(where: str, fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    first = build()
    (lock,) = (root / "locks").iterdir()
    shutil.rmtree(first.path.parent)
    lock.unlink()
    if where == "folder is a file":
        lock.parent.rmdir()
        lock.parent.write_text("x")
    elif where == "file is a folder":
        lock.mkdir()
    elif where == "file is a link":
        lock.symlink_to(root / "absent")
    else:
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if str(path).endswith(".lock"):
                raise PermissionError(errno.EACCES, "of another user", str(path))
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    assert not build().from_cache and build().from_cache


def test_a_lock_of_another_user_is_taken_by_reading(root: Path, monkeypatch: Patch) -> None:
    assert locks_held() == [True]
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".lock") and flags & os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "mode 0644", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert locks_held() == [True]


def test_a_lock_excludes_and_is_given_up(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "locks" / "a.lock"
    with locks.held(path, wait_s=900, what="k") as first, locks.held(path, wait_s=0.1, what="k") as second:
        assert first and not second
    assert "another process holds" in caplog.text
    assert locks_held() == [True]
    filelock = pytest.importorskip("filelock")  # what earlier versions locked the same files with
    with filelock.FileLock(path), locks.held(path, wait_s=0, what="k") as held:
        assert not held


def test_a_forked_child_does_not_keep_the_lock(root: Path) -> None:
    path = root / "locks" / "a.lock"
    with locks.held(path, wait_s=0, what="k") as held:
        assert held
        child = subprocess.Popen(
            ["sleep", "60"], pass_fds=[int(f) for f in os.listdir("/proc/self/fd") if names(f, path)]
        )
    try:
        with locks.held(path, wait_s=0, what="k") as held:
            assert held
    finally:
        child.kill()
        child.wait()


def names(descriptor: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    except OSError:
        return False


CLEARER = """
import sys
from flashmoe_gen.cache import Cache
sys.stdin.readline()
print(Cache().clear())
"""


def test_many_processes_clear_at_once(fake: FakeCompiler, root: Path) -> None:
    entry = build().path.parent
    count = 200
    for number in range(count - 1):
        shutil.copytree(entry, entry.with_name(f"answer-{number:016x}"))
    clearers = [
        subprocess.Popen([sys.executable, "-c", CLEARER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for clearer in clearers:
        assert clearer.stdin
        clearer.stdin.write("go\n")
        clearer.stdin.flush()
    answers = [clearer.communicate(timeout=120)[0] for clearer in clearers]
    assert [clearer.returncode for clearer in clearers] == [0, 0, 0]
    assert sum(map(int, answers)) == count  # each entry was removed by one of them
    assert Cache().entries() == [] and not unfinished(root)


@pytest.mark.parametrize("step", ["touch", "write_text", "write_bytes", "rename"])
def test_cleared_while_it_is_built(step: str, fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    """Somebody removes the whole folder at each step of writing an entry, once or twice."""
    owner: Any = os if step == "rename" else Path
    real, left = getattr(owner, step), [2]

    def vanish(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            shutil.rmtree(root)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, step, vanish)
    kernel = build()
    assert left == [0] and fake.calls == 1 and kernel.image == b"image 1" * 50
    assert build().from_cache and not unfinished(root)


def test_entries_and_builds_while_others_clear(fake: FakeCompiler, root: Path) -> None:
    stop = threading.Event()

    def clear() -> int:
        removed = 0
        while not stop.is_set():
            removed += Cache().clear()
            shutil.rmtree(root, ignore_errors=True)
            time.sleep(0.001)  # between two steps of a builder, not between all of them
        return removed

    with ThreadPoolExecutor(2) as pool:
        clearing = pool.submit(clear)
        try:
            for number in range(60):
                assert build(text=f"{TEXT}// {number}").name == "answer"
                assert len(Cache().entries()) <= 60
        finally:
            stop.set()
        assert clearing.result() <= 60


def test_clear_removes_the_rest_before_it_raises(fake: FakeCompiler, root: Path, monkeypatch: Patch) -> None:
    kept, gone = build(name="a").path.parent, build(name="b").path.parent
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source) == kept:
            raise PermissionError(errno.EPERM, "of another user", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CacheError, match="of another user"):
        Cache().clear()
    assert kept.exists() and not gone.exists()


def test_a_folder_that_cannot_be_read(root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "listdir", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    for call in (Cache().entries, Cache().clear):
        with pytest.raises(CacheError, match=r"cannot be read.*Permission denied.*FLASHMOE_CACHE_DIR"):
            call()


@needs_gxx
def test_a_compiler_behind_a_wrapper(tmp_path: Path, monkeypatch: Patch) -> None:
    """The wrapper's file stays as it is; what it runs is upgraded, or is another compiler."""
    own = tmp_path / "wrapper"
    own.write_text(
        '#!/bin/sh\ncase "$*" in *--version) echo "$VERSION"; exit;; esac\n[ "$1" = g++ ] && shift\nexec g++ "$@"\n'
    )
    own.chmod(0o755)
    paths = set()
    for command, version in ((f"{own}", "g++ 12.2"), (f"{own}", "g++ 14.1"), (f"{own} g++", "clang 19")):
        monkeypatch.setenv("CXX", command)
        monkeypatch.setenv("VERSION", version)
        compile_module._version.cache_clear()  # as in a new process
        kernel = build()
        assert not kernel.from_cache and kernel.compiler.startswith(version)
        paths.add(kernel.path)
        assert build().from_cache
    assert len(paths) == 3
