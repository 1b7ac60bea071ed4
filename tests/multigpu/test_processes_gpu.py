"""Processes with a GPU each: worker.py under mpirun, under torchrun, and started by hand when one of them is to die."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multigpu
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKER = str(HERE / "worker.py")
GROUPS = ("bounds", "placements", "invariant", "graphs", "many", "delays", "two_layers", "bad_input", "different_calls")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "FLASHMOE_TIMEOUT_S": "20", "NVSHMEM_DISABLE_NVLS": "1", **more}


def run(command: list[str], **more: str) -> str:
    """Run a launcher to its end, or end it in time for it to end its ranks; what it printed."""
    limited = ["timeout", "-k", "10", "240", *command]
    done = subprocess.run(limited, env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def results(folder: Path, ranks: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]
    for each in found:
        assert "error" not in each, each["error"]
    if kept := os.environ.get("MULTIGPU_RESULTS"):
        for rank, each in zip(ranks, found):
            Path(kept, f"{folder.name}-rank{rank}.json").write_text(json.dumps(each, indent=1))
    return found


def mpirun(*command: str) -> list[str]:
    program = shutil.which("mpirun")
    if program is None:
        pytest.skip("mpirun is not on this machine")
    as_root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return [program, *as_root, "--bind-to", "none", "-n", "2", sys.executable, *command]  # a rank compiles on all cores


def torchrun(*command: str) -> list[str]:
    pytest.importorskip("torch")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]


def assert_right(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if not isinstance(value, dict):
            continue
        cases = value if name in ("bounds", "invariant") else {name: value}
        for case, each in cases.items():
            if name == "invariant":
                assert each, f"{case}: other bits than on one GPU"
            elif "bound" in each:
                assert each["error"] <= each["bound"] and each.get("same_bits", True), f"{name}, {case}: {each}"


def test_under_mpirun(tmp_path: Path) -> None:
    run(mpirun(WORKER, str(tmp_path), "cuda", *GROUPS))
    first, second = results(tmp_path)
    for found in (first, second):
        assert set(GROUPS) <= set(found)
        assert_right(found)
        told = found["different_calls"]["told"]
        assert told["type"] == "CommError" and "calls its layer" in told["text"], told
    assert second["bad_input"]["told"]["type"] == "SpecError"
    told = first["bad_input"]["told"]
    assert told["type"] == "CommError" and "Rank 1 raised SpecError: x has shape" in told["text"], told
    assert told["seconds"] < 5


def test_under_torchrun(tmp_path: Path) -> None:
    run(torchrun(WORKER, str(tmp_path), "cuda", "placements", "many", "bad_input"))
    for found in results(tmp_path):
        assert_right(found)


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(tmp_path), "cuda", "dies"],
            env=environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FLASHMOE_TIMEOUT_S="5"
            ),
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(120) < 0
        killed = time.monotonic()
        assert ranks[0].wait(60) == 0
        assert time.monotonic() - killed < 20  # the deadline of 5 s, and the end of a process that has used a GPU
    finally:
        for rank in ranks:
            rank.kill()
    told = results(tmp_path, (0,))[0]["dies"]["told"]
    assert "rank 1" in told["text"].lower() and told["seconds"] < 8, told


@pytest.mark.parametrize("launcher", [mpirun, torchrun])
def test_the_example(launcher: Any) -> None:
    said = run(launcher(str(ROOT / "examples" / "expert_parallel.py")))
    assert "2 rank(s) on cuda" in said, said


def test_programs_of_flashmoe_py() -> None:
    said = run(mpirun(str(HERE / "compat_worker.py")))
    assert all(f"rank {rank} of 2: ok" in said for rank in range(2)), said
