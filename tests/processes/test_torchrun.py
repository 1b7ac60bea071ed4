"""Ranks that torchrun starts, on the host target, with and without a group of the user's."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import pytest
from spawn import ROOT, launch, spawn
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
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import torch.distributed as dist
import flashmoe_gen as fmg
dist.init_process_group({group})
for _ in range(2):
    with fmg.comm.init({method}) as comm:
        comm.barrier()
        assert (comm.rank, comm.world_size) == (dist.get_rank(), dist.get_world_size())
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("method", ["", "'torch'"])
@pytest.mark.parametrize("where", ["'gloo'", "'cpu:gloo'"])
def test_a_group_of_the_user(where: str, method: str, torchrun: list[str], tmp_path: Path) -> None:
    """Whatever its backend is; twice."""
    script = tmp_path / "group.py"
    script.write_text(GROUP.format(group=where, method=method))
    ended = launch([*torchrun, "--nproc_per_node=2", script])
    assert ended.code == 0, ended.err
    assert sum("torch.distributed (" in line for line in ended.out.splitlines()) == 4, ended


def test_a_store_of_the_user(torchrun: list[str], tmp_path: Path) -> None:
    """A group that was not made from the environment."""
    script = tmp_path / "group.py"
    group = f"'gloo', init_method='file://{tmp_path}/store', rank=int(sys.argv[1]), world_size=2"
    script.write_text(GROUP.format(group=group, method=""))
    with spawn(2, script, each=[{}, {}]) as unused:
        unused.end()
    from spawn import Spawned, environment

    with Spawned([[sys.executable, script, rank] for rank in range(2)], [environment()] * 2) as ranks:
        for ended in ranks.wait():
            assert ended.code == 0, ended.err


LATER = """
import torch.distributed as dist
import flashmoe_gen as fmg
comm = fmg.comm.init({method!r})
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
    script.write_text(LATER.format(method="torch"))
    if launcher == "torchrun":
        assert (ended := launch([*torchrun, "--nproc_per_node=2", script])).code == 0, ended
    else:
        with spawn(2, script) as ranks:
            for ended in ranks.wait():
                assert ended.code == 0, ended.err


ALONE = """
import sys
import flashmoe_gen as fmg
try:
    if sys.argv[1] == "0":
        fmg.comm.init({method!r})
    else:
        sys.stdin.read()
except fmg.FlashMoEError as error:
    print(type(error).__name__, error)
"""


def test_a_rank_that_never_comes(torchrun: list[str], tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(method="torch").replace("sys.argv[1]", "__import__('os').environ['RANK']"))
    ended = launch([*torchrun, "--nproc_per_node=3", script], FLASHMOE_INIT_TIMEOUT_S="2")
    assert ended.out.startswith("CommError Ranks 1, 2 did not come to init() within 2 s"), ended


def test_torchruns_own_store_is_in_the_way_of_env(torchrun: list[str], tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(method="env").replace("sys.argv[1]", "__import__('os').environ['RANK']"))
    ended = launch([*torchrun, "--nproc_per_node=2", script])
    assert ended.out.startswith("SpecError method='env': torchrun itself listens at MASTER_PORT. Use method='torch'."), ended
