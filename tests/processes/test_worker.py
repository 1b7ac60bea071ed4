"""The worker of the tests on several GPUs, here with two processes on the host target: the same cases, but for graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spawn import ROOT, spawn

WORKER = ROOT / "tests" / "multigpu" / "worker.py"
GROUPS = ("placements", "two_layers", "bad_input", "different_calls")
ALL = ("bounds", "invariant", "many", "delays")


def results(folder: Path, *groups: str, survivors: tuple[int, ...] = (0, 1), **variables: str) -> list[dict[str, Any]]:
    """What the ranks that end by themselves wrote."""
    with spawn(2, WORKER, folder, "host", *groups, **variables) as ranks:
        ended = ranks.wait(200)
    assert all(ended[rank].code == 0 for rank in survivors), ended
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in survivors]


def assert_right(found: dict[str, Any], groups: tuple[str, ...]) -> None:
    for name in groups:
        value = found[name]
        if name == "invariant":
            assert value and all(value.values()), value
            continue
        for each in value.values() if name == "bounds" else [value]:
            assert each["error"] <= each["bound"] and each.get("same_bits", True), f"{name}: {each}"


def test_cases(tmp_path: Path) -> None:
    first, second = results(tmp_path, *GROUPS)
    for found, peer in ((first, 1), (second, 0)):
        assert_right(found, GROUPS)
        told = found["different_calls"]["told"]
        assert told["type"] == "CommError" and f"where rank {peer} calls its layer" in told["text"], told
    assert second["bad_input"]["told"]["type"] == "SpecError"
    told = first["bad_input"]["told"]
    assert told["type"] == "CommError" and "Rank 1 raised SpecError: x has shape" in told["text"], told
    assert told["seconds"] < 5


@pytest.mark.full
def test_every_dtype_and_many_calls(tmp_path: Path) -> None:
    for found in results(tmp_path, *ALL):
        assert_right(found, ALL)


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    (found,) = results(tmp_path, "dies", survivors=(0,), FLASHMOE_TIMEOUT_S="2")
    told = found["dies"]["told"]
    assert "rank 1" in told["text"].lower() and told["seconds"] < 4, told
