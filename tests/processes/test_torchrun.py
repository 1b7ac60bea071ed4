"""Ranks that torchrun starts, on the host target, with and without a group of the user's; few, as importing torch takes long."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import pytest
from spawn import ROOT, Spawned, environment, launch, spawn
from test_mpirun import results_of


def test_bits_of_one_rank(torchrun: list[str], tmp_path: Path) -> None:
    ended = launch([*torchrun, "--nproc_per_node=2", Path(cases.__file__), tmp_path, "bfloat16", "few_experts"])
    for each in results_of(tmp_path, ended, 2):
        assert each["bfloat16"] == each["few_experts"] == ""


def test_example(torchrun: list[str]) -> None:
    ended = launch([*torchrun, "--nproc_per_node=2", ROOT / "examples" / "expert_parallel.py"])
    assert ended.code == 0, ended.err
    assert ended.out.startswith("2 rank(s) on host")


GROUP = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import torch.distributed as dist
import flashmoe_gen as fmg
dist.init_process_group({group})
for method in ("auto", "torch"):
    with fmg.comm.init(method) as comm:
        comm.barrier()
        assert (comm.rank, comm.world_size) == (dist.get_rank(), dist.get_world_size())
dist.barrier()
dist.destroy_process_group()
"""
SAID = "comm.init({!r}): torch.distributed (gloo) says rank {} of 2"


@pytest.mark.parametrize("where", ["the environment", "a file"])
def test_a_group_of_the_user(where: str, torchrun: list[str], tmp_path: Path) -> None:
    script, store = (
        tmp_path / "group.py",
        f", init_method='file://{tmp_path}/store', rank=int(sys.argv[1]), world_size=2",
    )
    script.write_text(GROUP.format(group="'gloo'" + (store if where == "a file" else "")))
    commands = [[sys.executable, script, rank] for rank in range(2)]
    if where == "the environment":
        commands = [[*torchrun, "--nproc_per_node=2", script]]
    with Spawned(commands, [environment()] * 2) as ranks:
        left = ranks.wait()
    assert not any(ended.code for ended in left), left
    said = sorted(line for ended in left for line in ended.out.splitlines() if "comm.init" in line)
    assert said == [SAID.format(method, rank) for method in ("auto", "torch") for rank in range(2)]


LATER = """
import torch.distributed as dist
import flashmoe_gen as fmg
comm = fmg.comm.init("torch")
dist.init_process_group("gloo")
assert dist.get_world_size() == comm.world_size == 2
comm.barrier()
dist.barrier()
comm.close()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "variables"])
def test_the_group_is_left_to_the_user(launcher: str, torchrun: list[str], tmp_path: Path) -> None:
    """The package takes the store alone: init_process_group works afterwards."""
    script = tmp_path / "later.py"
    script.write_text(LATER)
    if launcher == "torchrun":
        left = [launch([*torchrun, "--nproc_per_node=2", script])]
    else:
        with spawn(2, script) as ranks:
            left = ranks.wait()
    assert not any(ended.code for ended in left), left


ALONE = """
import os, time
import flashmoe_gen as fmg
if os.environ["RANK"] == "0":
    for method in ("env", "torch"):
        try:
            fmg.comm.init(method)
        except fmg.FlashMoEError as error:
            print(type(error).__name__, error)
"""


def test_what_cannot_work(torchrun: list[str], tmp_path: Path) -> None:
    """A rank that never comes, and a port that torchrun itself has."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    ended = launch([*torchrun, "--nproc_per_node=3", script], FLASHMOE_INIT_TIMEOUT_S="2")
    env, torch = ended.out.splitlines()
    assert env == "SpecError method='env': torchrun itself listens at MASTER_PORT. Use method='torch'."
    assert torch.startswith("CommError Ranks 1, 2 did not come to init() within 2 s. FLASHMOE_INIT_TIMEOUT_S")


MISSING = """
import os, sys
from flashmoe_gen.comm.bootstrap import find
from flashmoe_gen.errors import CommError
if os.environ["RANK"] == "2":
    sys.exit()
try:
    find("torch").gather(b"", "init()")
except CommError as error:
    print(error)
"""
HASTY = """
import os
from flashmoe_gen.comm.bootstrap import find
ranks = find("torch")
for turn in range(20):
    assert ranks.gather(b"%d" % ranks.rank, "init()") == [b"0", b"1", b"2"]
print("done", flush=True)
os._exit(0)
"""


def test_a_rank_that_never_comes(torchrun: list[str], tmp_path: Path) -> None:
    """Rank 0, which serves the store, is not the one to blame."""
    script = tmp_path / "missing.py"
    script.write_text(MISSING)
    with spawn(3, script, FLASHMOE_INIT_TIMEOUT_S="10") as ranks:
        left = ranks.wait()
    assert left[0].out == "Rank 2 did not come to init() within 10 s. FLASHMOE_INIT_TIMEOUT_S sets the limit.\n", left
    assert left[1].out.startswith(("Rank 2 did not come to init()", "init(): the store of torch.distributed")), left


def test_rank_0_ends_at_once(torchrun: list[str], tmp_path: Path) -> None:
    """The others read what was said before the store goes with it."""
    script = tmp_path / "hasty.py"
    script.write_text(HASTY)
    with spawn(3, script) as ranks:
        left = ranks.wait()
    assert [ended.out for ended in left] == ["done\n"] * 3, left
