"""Where the output of a command goes: terminals, pipes, full disks, closed streams and files."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from command import TINY

from flashmoe_gen import FlashMoEError, files
from flashmoe_gen.cli import console, main

TRACE = f"trace {TINY} --experts 8 --tokens 3 --target host"
PROGRAM = f"{shlex.quote(sys.executable)} -m flashmoe_gen"


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line with pipes and redirections."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
    )


def on_terminal(line: str, columns: int, **variables: str) -> str:
    """What a terminal of so many columns gets to show, control sequences removed."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flashmoe_gen", *shlex.split(line)], stdin=follower, stdout=follower, stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm", **variables},
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            more = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    os.close(leader)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [200, 80, 40])
@pytest.mark.parametrize("line", [f"compile {TINY}", "cache list", f"demo {TINY} --experts 8 --tokens 5"])
def test_no_name_or_number_is_broken(line: str, columns: int) -> None:
    main_line = f"compile {TINY}"
    found = json.loads(shell(f"{PROGRAM} {main_line} --json").stdout)
    shown = on_terminal(line, columns)
    words = shown.split()
    for kernel in found[:2]:
        assert kernel["name"] in words
    if line == main_line:
        assert {kernel["digest"][:12] for kernel in found[:2]} <= set(words)
        assert all(str(kernel["path"]) in words for kernel in found)
    elif columns < 200 and line.startswith("demo"):
        assert re.search(r"^error of y +\d\.\d\de-0\d\n", shown, re.MULTILINE), "one cell a line"
    assert not re.search(r"\n\s*\d{1,2}\n", shown), "digits on a line of their own"


def test_a_pipe_gets_lines_in_one_piece() -> None:
    lines = shell(
        f"{PROGRAM} cache list; {PROGRAM} demo {TINY} --experts 8 --tokens 5", COLUMNS="40"
    ).stdout.splitlines()
    assert any(re.match(r"rank +tokens .* second call$", line) for line in lines)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}])
def test_plain_terminals(variables: dict[str, str]) -> None:
    assert re.search(r"^\d+ kernels, .* in /", on_terminal("cache list", 80, **variables), re.MULTILINE)


@pytest.mark.parametrize(
    "line", [f"generate {TINY}", f"generate {TINY} --json", "cache list", f"demo {TINY} --experts 8"]
)
def test_a_full_disk(line: str) -> None:
    done = shell(f"{PROGRAM} {line} > /dev/full")
    assert done.returncode == 1
    said = [text for text in done.stderr.splitlines() if not text.endswith("...")]
    assert said == ["error: The output cannot be written: No space left on device."]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full(closed: str) -> None:
    done = shell(f"{PROGRAM} demo {TINY} --experts 8 --tokens 3 {closed}")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("PASS" in done.stdout) == (not closed.startswith(">"))


def test_a_reader_that_has_seen_enough() -> None:
    done = shell(f"{PROGRAM} demo {TINY} --experts 8 --tokens 3 | head -n 1")
    assert (
        done.stdout == "qwen3-30b-a3b: spec and plan\n"
        and "Traceback" not in done.stderr
        and "Broken" not in done.stderr
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_a_stream_cannot_encode(encoding: str) -> None:
    done = shell(rf"{PROGRAM} generate --config /tmp/ü$'\xff'€ --json", PYTHONIOENCODING=encoding)
    assert (
        done.returncode == 2 and json.loads(done.stdout)["error"]["exit_code"] == 2 and "Traceback" not in done.stderr
    )
    assert shell(f"{PROGRAM} generate {TINY}", PYTHONIOENCODING=encoding).returncode == 0


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": Path("x"), "d": (None, True)})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": "x", "d": [None, True]}


def test_a_slow_step_says_that_it_is_not_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_STILL_S", 0.01)

    def wait_for(text: str) -> None:
        err = ""
        while text not in err:
            time.sleep(0.01)
            err += capsys.readouterr().err

    with console.step("thinking"):
        wait_for("still thinking, 0 s\n")
    with console.progress("compiling", 2) as tally, tally.working_on("one"), tally.working_on("two"):
        wait_for("still compiling one, two, 0 s\n")
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "it is over"


# Files ---------------------------------------------------------------------------------------------------------------


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("command", [TRACE, "bench"])
@pytest.mark.parametrize("path", ["{}", "{}/no/file", "{}/file/below", "{}/" + 300 * "x", "/proc/no/file"])
def test_a_path_is_looked_at_before_the_work(
    command: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")
    code, err = run(f"{command} -o {path.format(tmp_path)}", capsys)
    assert code == 1 and "cannot be written" in err
    assert "compiling" not in err and "making" not in err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("before")
    for path in (new, old):
        assert run(f"{TRACE} --events 1 -o {path}", capsys)[0] == 2
    assert not new.exists() and old.read_text() == "before"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    files.require_writable(link)
    files.write_bytes(link, b"after")
    assert link.is_symlink() and path.read_text() == "after" and stat.S_IMODE(path.stat().st_mode) == 0o640

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FlashMoEError, match=f"{path} cannot be written: No space left on device"):
        files.write_bytes(path, b"more")
    assert path.read_text() == "after" and sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    done = shell(f"{PROGRAM} generate {TINY} -o /dev/stdout | head -n 1")
    assert done.stdout.startswith("// flashmoe_layer")
    done = shell(f"{PROGRAM} generate {TINY} -o /dev/stdout > {tmp_path / 'out'}; {PROGRAM} {TRACE} -o /dev/full")
    assert (tmp_path / "out").read_text().startswith("// flashmoe_layer") and "No space left" in done.stderr
    done = shell(f"{PROGRAM} {TRACE} --json -o >(cat > {tmp_path / 'copy'}); wait; sleep 0.2")
    assert json.loads((tmp_path / "copy").read_text())["traceEvents"]
