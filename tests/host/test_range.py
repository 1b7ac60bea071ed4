"""float16 ends at 65504: rows and intermediates may pass it, as long as weight times row fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from limits import LargeIntermediates, LargeRows, peaks
from world import BOUNDS, Problem, World, bits, prebuild, relative_error, routes

import flashmoe_gen as fmg

LARGEST = 65504
TILE = fmg.TileConfig(block_m=8, block_n=24)
SPEC = fmg.MoESpec(
    64, 48, 5, 3, dtype="float16", mlp="vanilla", activation="identity", bias=True, max_tokens=60, batch_invariant=False
)
WORLDS = [(1, "route"), (2, "route"), (2, "rank"), (3, "rank")]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    prebuild([(SPEC, "moe", TILE)])


@pytest.mark.parametrize(("world_size", "combine"), WORLDS)
@pytest.mark.parametrize("kind", [LargeRows, LargeIntermediates])
def test_what_passes_the_largest_number_comes_back(kind: Any, world_size: int, combine: str) -> None:
    spec = SPEC.replace(world_size=world_size)
    problem = kind(spec)
    inputs = [problem.case(60 - 7 * rank, rank) for rank in range(world_size)]
    row, middle = peaks(problem, inputs[0])
    assert (row if kind is LargeRows else middle) > 1.05 * LARGEST
    for y, case in zip(World(spec, tile=TILE, schedule=fmg.Schedule(combine=combine)).run(problem, inputs), inputs):
        want = problem.reference(*case)
        assert abs(want).max() < LARGEST and relative_error(y, want) <= BOUNDS["float16"]


def test_the_bits_do_not_depend_on_the_ranks() -> None:
    problem = LargeRows(SPEC)
    case = problem.case(60, 0)
    (alone,) = World(SPEC, tile=TILE).run(problem, [case])
    halves = [tuple(part[:25] for part in case), tuple(part[25:] for part in case)]
    both = World(SPEC.replace(world_size=2), tile=TILE, schedule=fmg.Schedule(combine="route")).run(problem, halves)
    assert b"".join(map(bits, both)) == bits(alone)


@pytest.mark.parametrize(("world_size", "combine"), WORLDS)
def test_bad_weights_stay_in_their_token(world_size: int, combine: str) -> None:
    spec = SPEC.replace(world_size=world_size)
    problem, world = LargeRows(spec), World(spec, tile=TILE, schedule=fmg.Schedule(combine=combine))
    inputs = [problem.case(20, rank) for rank in range(world_size)]
    good = world.run(problem, inputs)
    for _, ids, weights in inputs:
        ids[4], ids[7], ids[9] = [0, 1, 2], [2, 3, 4], [-1, -1, -1]
        weights[4, 1], weights[7, 0] = np.nan, np.inf
        weights[9] = np.nan  # of masked routes
    rest = [token for token in range(20) if token not in (4, 7, 9)]
    for y, fine in zip(world.run(problem, inputs), good, strict=True):
        assert np.isnan(y[4]).all() and not np.isfinite(y[7]).any() and not y[9].any()
        assert bits(y[rest]) == bits(fine[rest])


@pytest.mark.parametrize("size", [1.0, 1e-2, 2e-4])
def test_small_outputs_keep_the_bound(size: float) -> None:
    """Down to where y itself is still far enough from the smallest step."""
    spec = SPEC.replace(bias=False)
    problem = Problem(spec)
    x = problem.tokens(60, 1).astype(np.float32)
    ids, weights = routes(spec, 60, "uniform", 0)
    weights /= weights.sum(axis=1, keepdims=True)
    x *= size / np.sqrt(np.mean(problem.reference(x, ids, weights) ** 2))
    x = x.astype(np.float16)
    (y,) = World(spec, tile=TILE).run(problem, [(x, ids, weights)])
    assert relative_error(y, problem.reference(x, ids, weights)) <= BOUNDS["float16"]
