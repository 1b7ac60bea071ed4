"""The protocol under a seeded scheduler: many interleavings, and planted bugs that must not survive them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aborts import CHECKS
from mutants import MUTANTS
from scenarios import Scenario, standard

SEEDS = 60  # for each of the ten scenarios: 600 interleavings
SCENARIOS = 10
FIRST_SEED = int(os.environ.get("FLASHMOE_TEST_SEED", "0"))


@pytest.fixture(scope="module")
def scenarios() -> list[Scenario]:
    return standard()


@pytest.fixture(autouse=True)
def simulated_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "1")  # a million steps


@pytest.mark.parametrize("number", range(SCENARIOS))
def test_every_interleaving_gives_the_reference(scenarios: list[Scenario], number: int) -> None:
    assert len(scenarios) == SCENARIOS
    scenario = scenarios[number]
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        scenario.run(seed)
        assert scenario.wrong() is None, f"scenario {number}, seed {seed}: {scenario.wrong()}"


def test_bits_do_not_depend_on_the_interleaving(scenarios: list[Scenario]) -> None:
    for scenario in scenarios:
        seen = set()
        for seed in range(20):
            scenario.run(seed)
            seen.add(b"".join(call.y.tobytes() for per_rank in scenario.calls for call in per_rank))
        assert len(seen) == 1


def test_a_seed_reproduces_its_run(scenarios: list[Scenario]) -> None:
    def steps(seed: int) -> int:
        scenarios[3].reset()  # the same epoch and parity at the start
        return scenarios[3].run(seed)

    assert len({steps(5) for _ in range(3)}) == 1
    assert len({steps(seed) for seed in range(8)}) == 8


def test_200_calls_with_changing_counts_on_two_layers() -> None:
    rng = np.random.default_rng(3)
    counts = [[int(n) for n in rng.integers(0, 24, 200)] for _ in range(3)]
    scenario = Scenario(3, combine="rank", counts=counts, hidden=(16, 32), slots=[[4, 2], [], [0, 1, 3]], seed=5)
    for seed in range(3):
        scenario.run(seed)
        assert scenario.wrong() is None, f"seed {seed}: {scenario.wrong()}"


@pytest.mark.parametrize("name", CHECKS)
def test_calls_that_cannot_work_fail_as_they_should(name: str) -> None:
    assert CHECKS[name](lambda scenario: None) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name: str) -> None:
    """In a process of its own: a mutant may follow a pointer that is not there yet."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent.parent}", "FLASHMOE_TIMEOUT_S": "0.3"}
    run = subprocess.run(
        [sys.executable, str(here / "mutants.py"), name], capture_output=True, text=True, env=environment, timeout=240
    )
    crashed = run.returncode < 0
    noticed = run.returncode == 0 and run.stdout.startswith("seed")
    assert crashed or noticed, f"{name}: exit {run.returncode}, {run.stdout!r}, {run.stderr[-2000:]}"


@pytest.mark.parametrize("combine", ["route", "rank"])
def test_64_ranks(combine: str) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (64, 2)).tolist()
    scenario = Scenario(64, combine=combine, counts=counts, experts=70, processors=1, pool=40 if combine == "rank" else None)
    for seed in (0, 2, 3):  # priorities need very many steps for so many threads that wait
        scenario.run(seed)
        assert scenario.wrong() is None, f"seed {seed}: {scenario.wrong()}"
