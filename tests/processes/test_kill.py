"""A rank that is killed at a random moment, by nobody that ends the others: each of these raises, naming it, and nothing stays."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from spawn import Spawned, spawn

WORLD_SIZE, DEADLINE_S = 3, 5.0
WORKER = """
import sys, time
sys.path[:0] = [{host!r}, {here!r}]
import flashmoe_gen as fmg
from cases import Problem, routes, spec_of

comm = fmg.comm.init()
spec = spec_of(comm.world_size)
layer, problem = fmg.MoELayer(spec, comm=comm), Problem(spec)
x, experts = problem.tokens(64, comm.rank), problem.experts(layer.placement.local_experts(comm.rank))
ids, weights = routes(spec, 64, "skewed", comm.rank)
count = 0
try:
    while True:
        last = time.time()
        count += 1
        layer(x[: count % 65], ids[: count % 65], weights[: count % 65], experts)
        if count == 3:
            print("running", flush=True)
        if count % 7 == 0:
            comm.barrier()
except fmg.CommError as error:
    print(f"raised {{time.time()}} {{type(error).__name__}}: {{error}}", flush=True)
comm.close(abort=True)
"""


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "flashmoe" in name}


def kill_one(folder: Path, rng: random.Random) -> None:
    """Start a world, kill one rank of it, and look at what the others say and leave."""
    here = Path(__file__).parent
    script = folder / "worker.py"
    script.write_text(WORKER.format(host=str(here.parent / "host"), here=str(here)))
    before = shared_memory()
    victim, wait = rng.randrange(WORLD_SIZE), rng.uniform(0, 0.5)
    with spawn(WORLD_SIZE, script, FLASHMOE_TIMEOUT_S=str(DEADLINE_S)) as ranks:
        ranks.await_text("running")
        time.sleep(wait)
        ranks.kill(victim)
        killed = time.time()
        left = ranks.wait(60)
        check(ranks, victim, killed, [each.out for each in left], str(left))
        assert [each.code for each in left] == [-9 if rank == victim else 0 for rank in range(WORLD_SIZE)], left
    assert shared_memory() == before


def check(ranks: Spawned, victim: int, killed: float, said: list[str], everything: str) -> None:
    for rank, out in enumerate(said):
        if rank == victim:
            continue
        word, when, error = out.splitlines()[-1].split(" ", 2)
        assert word == "raised" and f"rank {victim}" in error.lower(), f"rank {victim} was killed: {everything}"
        assert float(when) - killed < DEADLINE_S + 2, everything
    assert not ranks.leftovers()


@pytest.mark.parametrize("number", range(3))
def test_killed(number: int, tmp_path: Path) -> None:
    kill_one(tmp_path, random.Random(number))


@pytest.mark.full
def test_killed_often(tmp_path: Path) -> None:
    for number in range(3, 20):
        (folder := tmp_path / str(number)).mkdir()
        kill_one(folder, random.Random(number))
