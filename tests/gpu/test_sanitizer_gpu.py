"""compute-sanitizer finds nothing in the kernels: no access out of bounds (memcheck), no race in shared memory (racecheck)."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import make

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
TIMEOUT_S = 60
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": ["--racecheck-report", "all"]}
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
FOUND = 9


def sanitized(tool: str, *arguments: str) -> tuple[int | None, str]:
    """Exit status (None: it took too long) and output of a tool over sanitized.py."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    command = [
        program,
        "--tool",
        tool,
        *TOOLS[tool],
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        str(HERE / "sanitized.py"),
    ]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "FLASHMOE_TIMEOUT_S": "0"},
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the tool and what it runs
        return None, f"more than {TIMEOUT_S} s: {run.communicate()[0]}"
    return run.returncode, output


@functools.cache
def reason_not_to_trust(tool: str) -> str | None:
    """Why a tool is no use here: it misses planted errors, for instance on a virtual machine that it cannot attach to."""
    status, output = sanitized(tool, "planted", tool)
    if status == FOUND and "SUMMARY" in output:
        return None
    return f"{tool} does not find planted errors here (exit status {status}): {output[-500:]}"


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("way", ["bfloat16/wgmma", "bfloat16/mma", "tf32/mma"])
def test_the_sanitizer_finds_nothing(way: str, tool: str) -> None:
    make(way)  # skips where there is no such program
    if reason := reason_not_to_trust(tool):
        pytest.skip(reason)
    status, output = sanitized(tool, way)
    assert status == 0, output[-6000:]
    assert "finished" in output and CLEAN[tool] in output, output[-6000:]
