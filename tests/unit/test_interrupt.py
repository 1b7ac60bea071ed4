"""Ctrl-C, in real processes: the command says what it was doing, leaves nothing half-done, and is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flashmoe_gen.cli import checks, interrupt
from flashmoe_gen.errors import CommError, SpecError

LAYER = "--set hidden_size=1024 --set intermediate_size=1024"
# What is interrupted: the line, a line of its stderr after which it is, and what it then says that it was doing.
CASES = {
    "two ranks": (f"demo {LAYER} --experts 8 --tokens 20000", "running 2 ranks", "running 2 ranks"),
    "one rank": (f"demo {LAYER} --experts 8 --tokens 40000 --ranks 1", "running 1 rank", "running 1 rank"),
    "reference": (f"demo {LAYER} --experts 128 --tokens 20", "float64 reference", "computing the float64 reference"),
    "weights": ("demo --experts 128 --tokens 1", "making", "making 1.12 GiB of random weights"),
    "trace": (
        f"trace --target host {LAYER} --experts 8 --tokens 30000 -o trace.json",
        "tracing",
        "tracing 1 rank, with room for",
    ),
    "compile": ("compile --model qwen3-30b-a3b --arch host", "compiling", "compiling the "),
}
WAIT_S = 120.0  # for a hang to be called one


class Process:
    """The command line in a process and a session of its own, stderr read as it comes."""

    def __init__(self, line: str, folder: Path, *, program: tuple[str, ...] = ("-m", "flashmoe_gen")) -> None:
        environment = {**os.environ, "TMPDIR": str(folder)}
        if line.startswith("compile"):
            environment["FLASHMOE_CACHE_DIR"] = str(folder / "cache")
        self.process = subprocess.Popen(
            [sys.executable, *program, *line.split()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=folder, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
        )  # fmt: skip
        self.err: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.err.append(line)
                self._news.notify_all()

    def wait_for(self, text: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: text in "".join(self.err), WAIT_S), self.err

    def interrupt(self, times: int = 1) -> tuple[str, str]:
        """Send it, until the process is gone if it is many times; return stdout and stderr."""
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)
            if times > 1:
                time.sleep(0.01)
        killer = threading.Timer(WAIT_S, self.process.kill)
        killer.start()
        try:
            assert self.process.stdout is not None
            out = self.process.stdout.read()
            self.process.wait()
            self._reader.join(WAIT_S)
            return out, "".join(self.err)
        finally:
            killer.cancel()


@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize("name", CASES)
def test_says_what_it_was_doing(name: str, times: int, tmp_path: Path) -> None:
    line, until, doing = CASES[name]
    process = Process(f"{line} --json", tmp_path)
    process.wait_for(until)
    time.sleep(0.2)  # well into it; any moment is right
    out, err = process.interrupt(times)
    assert process.process.returncode == 130, out + err
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)
    assert error["message"].startswith(f"Interrupted while {doing}") and error["message"] in err
    assert "Traceback" not in err and "Exception" not in err
    assert_nothing_left(tmp_path)


def assert_nothing_left(folder: Path) -> None:
    """No process that works there (compilers do), and no file that is not whole."""
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if works_in(path, folder)]
    for path in folder.rglob("*"):
        assert "cache" in path.relative_to(folder).parts, f"{path} is left"
    assert not [*folder.rglob(".building-*"), *folder.rglob("failed/*")]


def works_in(link: Path, folder: Path) -> bool:
    try:
        return os.readlink(link).startswith(str(folder))
    except OSError:  # it has ended, or belongs to somebody else
        return False


def test_a_main_thread_that_does_not_hear(tmp_path: Path) -> None:
    """NVRTC or BLAS in the main thread: here a C function that goes on after a signal."""
    program = tmp_path / "deaf.py"
    program.write_text(
        "import ctypes\n"
        "from flashmoe_gen import cli\n"
        "from flashmoe_gen.cli import console\n"
        "@cli.app.command()\n"
        "def deaf() -> None:\n"
        "    with console.step('being deaf'):\n"
        "        mutex = (ctypes.c_char * 64)()\n"
        "        library = ctypes.CDLL(None)\n"
        "        library.pthread_mutex_lock(mutex)\n"
        "        library.pthread_mutex_lock(mutex)  # for ever, whatever signals come\n"
        "cli.main()\n"
    )
    process = Process("deaf", tmp_path, program=(str(program),))
    process.wait_for("being deaf")
    _, err = process.interrupt()
    assert (
        process.process.returncode == 130 and "error: Interrupted while being deaf." in err and "Traceback" not in err
    )


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), interrupt.answered(lambda: pytest.fail("it was heard")):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # what cleans up is not interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_one_rank_fails_for_all() -> None:
    """The others would wait for it; what is raised is where it began."""
    aborted = threading.Event()

    def work(rank: int) -> int:
        if rank == 2:
            raise SpecError("rank 2 is wrong")
        assert aborted.wait(WAIT_S)
        raise CommError("ended")

    with pytest.raises(SpecError, match="rank 2 is wrong"):
        checks._on_ranks(4, work, aborted.set)


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted, start = threading.Event(), threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "rank 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(Exception, match="The system refused to start 3 threads"):
        checks._on_ranks(3, lambda rank: aborted.wait(WAIT_S), aborted.set)
