"""The demo on a GPU: one rank, and two that share it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from flashmoe_gen.cli import main

pytestmark = pytest.mark.gpu

DEMO = "demo --target cuda --set hidden_size=256 --set intermediate_size=128 --set top_k=2 --experts 8 --tokens 40"


def run(line: str, capture: pytest.CaptureFixture[str]) -> str:
    """What a line that must pass prints on stdout."""
    capture.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    out, err = capture.readouterr()
    assert not caught.value.code, out + err
    return out


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ("--ranks 1", 5),
        ("--ranks 2", 5),
        ("--ranks 2 --set combine=rank", 4),  # rows summed by their owner have other bits than one rank's
        ("--ranks 2 --set dtype=float32", 5),
        ("--ranks 1 --set dtype=float32 --set math=ffma", 5),
    ],
)
def test_demo(options: str, checks: int, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(run(f"{DEMO} {options} --json", capsys))
    assert found["passed"] and [check["passed"] for check in found["checks"]] == [True] * checks
    assert found["target"] == "cuda" and found["device"] and found["gpu_kernels"] == []
    ranks = found["ranks"]
    assert sum(rank["rows"] for rank in ranks) == sum(rank["routes"] for rank in ranks) == len(ranks) * 40 * 2
    assert all(0 < rank["second_layer_seconds"] < 1 and 0 < rank["route_seconds"] < 1 for rank in ranks)


def test_what_the_demo_prints(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(DEMO, capsys)
    assert "GPU kernels (sm_" in out and "times: CUDA events" in out and "all 5 checks" in out
    assert "Host kernels" not in out and "The same layer for GPUs" not in out
