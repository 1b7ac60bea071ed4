"""Programs of flashmoe-py under real launchers: ``compat_worker.py``, which checks itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from spawn import Ended, spawn

WORKER = Path(__file__).with_name("compat_worker.py")


def assert_all_right(ended: list[Ended], world_size: int) -> None:
    said = sorted(line for one in ended for line in one.out.splitlines())
    assert all(one.code == 0 for one in ended), ended
    assert said == [f"rank {rank} of {world_size}: ok" for rank in range(world_size)], ended


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_under_mpirun(mpirun: list[str], run: Callable[..., Ended], world_size: int) -> None:
    assert_all_right([run([*mpirun, "-n", world_size, sys.executable, WORKER])], world_size)


def test_under_torchrun(torchrun: list[str], run: Callable[..., Ended]) -> None:
    assert_all_right([run([*torchrun, "--nproc_per_node=2", WORKER])], 2)


def test_with_variables_alone() -> None:
    with spawn(3, WORKER) as ranks:
        assert_all_right(ranks.wait(), 3)
