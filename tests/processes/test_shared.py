"""Heaps and calls of processes that share memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group import Group, error_of, join

import flashmoe_gen as fmg
from world import Problem, World, bits, routes

SPEC = fmg.MoESpec(64, 48, 8, 2, dtype="float32", max_tokens=64)
COUNTS = (64, 0, 17)


def inputs_of(spec: fmg.MoESpec, rank: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (Problem(spec).tokens(count, rank), *routes(spec, count, "skewed", rank))


def call(layer: fmg.MoELayer, count: int = 64) -> np.ndarray:
    rank = layer.comm.rank
    experts = Problem(layer.spec).experts(layer.placement.local_experts(rank))
    return layer(*inputs_of(layer.spec, rank, count), experts)


def digest(y: np.ndarray) -> str:
    return hashlib.sha256(bits(y)).hexdigest()


def calls(world_size: int) -> list[str]:
    with join() as comm, fmg.MoELayer(SPEC.replace(world_size=world_size), comm=comm) as layer:
        return [digest(call(layer, COUNTS[(n + comm.rank) % 3])) for n in range(12)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_calls_have_the_bits_of_a_local_group(tmp_path: Path, world_size: int) -> None:
    spec = SPEC.replace(world_size=world_size)
    group = Group(tmp_path, __name__, "calls", world_size, world_size)
    world = World(spec)
    problem = Problem(spec)
    want = [
        world.run(problem, [inputs_of(spec, rank, COUNTS[(n + rank) % 3]) for rank in range(world_size)])
        for n in range(3)
    ]
    for rank, got in enumerate(group.results()):
        assert got == [digest(want[n % 3][rank]) for n in range(12)]
