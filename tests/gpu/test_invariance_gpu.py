"""Batch invariance: with ``batch_invariant=True`` a token's bits depend on nothing but the token, its routes and the weights.

Not on the tokens beside it, their number or order, nor on ranks, placement, number of blocks or order of tasks; and not on
the tile either, as long as arithmetic and block program stay. Both programs sum the products of an output in one
accumulator, with k ascending in steps of the instruction, so tiles that differ in ``block_m``, ``block_n``, ``stages`` and
warps must agree: only then may a tuner choose among them. Nothing is claimed between programs (mma and wgmma), between
``math`` tf32 and ffma, or between dtypes; and ``block_k`` is the same throughout. The router is in test_router_gpu.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from ranks import BF16, BOUNDS, Case, Problem, Ranks, assert_close, build, inputs_of, make, random_placement, runs_here

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu

TOKENS = 300
# Way -> tiles that must agree with its default, as changes to it.
TILES: dict[str, dict[str, dict[str, int]]] = {
    "bfloat16/wgmma": {
        "half as wide": {"block_n": 128},
        "3 stages": {"stages": 3},
        "half as wide, 6 stages": {"block_n": 128, "stages": 6},
        "blocks on their own": {"cluster": 1},
    },
    "bfloat16/mma": {
        "16 x 128": {"block_m": 16, "block_n": 128, "stages": 2, "warps_m": 1, "warps_n": 4},
        "32 x 64": {"block_m": 32, "block_n": 64, "stages": 4, "warps_m": 2, "warps_n": 2},
        "64 x 64, 8 warps": {"block_m": 64, "block_n": 64, "stages": 2, "warps_m": 4, "warps_n": 2},
        "128 x 128": {"block_m": 128, "block_n": 128, "stages": 3, "warps_m": 4, "warps_n": 2},
    },
    "tf32/mma": {
        "16 x 64": {"block_m": 16, "block_n": 64, "stages": 2, "warps_m": 1, "warps_n": 4},
        "128 x 128": {"block_m": 128, "block_n": 128, "stages": 2, "warps_m": 4, "warps_n": 2},
    },
    "ffma/mma": {
        "16 x 64": {"block_m": 16, "block_n": 64, "stages": 2, "warps_m": 1, "warps_n": 4},
        "128 x 128": {"block_m": 128, "block_n": 128, "stages": 2, "warps_m": 4, "warps_n": 2},
    },
    "float64/mma": {"32 x 128": {"block_m": 32, "block_n": 128, "stages": 2, "warps_m": 2, "warps_n": 4}},
}
WIDE = (576, 400, 7, 3)  # rows longer than any pipeline, with a tail


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compile all tiles on all cores."""
    wanted = []
    for way in filter(runs_here, TILES):
        spec, tile = make(way, shape=WIDE)
        wanted += [(spec, {"tile": tile.replace(**changes)}) for changes in ({}, *TILES[way].values())]
    build(wanted)


@functools.cache
def problem_of(spec: fmg.MoESpec) -> Problem:
    return Problem(spec)


def whole_batch(way: str, **fields: Any) -> tuple[Problem, Case, np.ndarray, fmg.TileConfig]:
    """A batch, what one rank makes of it, and the tile."""
    spec, tile = make(way, batch_invariant=True, max_tokens=TOKENS, **fields)
    problem = problem_of(spec)
    (case,) = inputs_of(problem, spec, [TOKENS], "skewed")
    (y,) = Ranks(spec, tile).run(problem, [case])
    assert_close(problem, case, y, BOUNDS[way])
    return problem, case, y, tile


def rows_of(case: Case, rows: Any) -> Case:
    x, ids, weights = case
    return np.ascontiguousarray(x[rows]), np.ascontiguousarray(ids[rows]), np.ascontiguousarray(weights[rows])


@pytest.mark.parametrize("way", BOUNDS)
def test_bits_of_a_token_do_not_depend_on_the_batch(way: str) -> None:
    problem, case, whole, tile = whole_batch(way)
    ranks = Ranks(problem.spec, tile)
    rng = np.random.default_rng(3)
    for tokens in (1, 1, 1, 7, 64, 64, 129, TOKENS):
        rows = rng.permutation(TOKENS)[:tokens]
        (y,) = ranks.run(problem, [rows_of(case, rows)])
        assert y.tobytes() == whole[rows].tobytes(), f"{tokens} tokens"
    same = np.zeros(40, int)  # a token beside copies of itself
    (y,) = ranks.run(problem, [rows_of(case, same)])
    assert y.tobytes() == whole[same].tobytes()


@pytest.mark.parametrize("way", BF16)
def test_bits_of_a_token_do_not_depend_on_the_rows_of_its_expert(way: str) -> None:
    """One expert has all rows: fewer and more than fit a warpgroup, an M-block, a claim, and an odd number of column tiles."""
    spec, tile = make(way, batch_invariant=True, max_tokens=400, shape=(576, 296, 3, 1))
    problem = Problem(spec)
    x, _, weights = inputs_of(problem, spec, [400], "uniform")[0]
    case = (x, np.full((400, 1), 2, np.int32), weights)
    ranks = Ranks(spec, tile)
    (whole,) = ranks.run(problem, [case])
    assert_close(problem, case, whole, BOUNDS[way])
    for tokens in (1, 15, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 320, 321, 384, 385):
        (y,) = ranks.run(problem, [rows_of(case, slice(tokens))])
        assert y.tobytes() == whole[:tokens].tobytes(), f"{tokens} rows"


# What changes nothing but who computes what and when.
LAUNCHES: dict[str, dict[str, Any]] = {
    "2 ranks": {"world_size": 2},
    "3 ranks": {"world_size": 3},
    "4 ranks, 5 blocks each": {"world_size": 4, "max_blocks": 5},
    "4 blocks": {"max_blocks": 4},
    "no lag": {"lag": 0},
    "2 ranks, lag 9": {"world_size": 2, "lag": 9},
    "panels of 5": {"panel": 5},
    "3 ranks, lag 1, panels of 2, 9 blocks each": {"world_size": 3, "lag": 1, "panel": 2, "max_blocks": 9},
    "a ring of 2": {"ring": 2},
}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("way", BF16)
def test_bits_of_a_token_do_not_depend_on_ranks_or_tasks(way: str, launch: str) -> None:
    problem, case, whole, tile = whole_batch(way)
    options = {"world_size": 1, "max_blocks": None, **LAUNCHES[launch]}
    world_size, max_blocks = options.pop("world_size"), options.pop("max_blocks")
    spec = problem.spec.replace(world_size=world_size)
    rng = np.random.default_rng(4)
    for _ in range(3):
        placement = random_placement(rng, spec.num_experts, world_size)
        ranks = Ranks(spec, tile, placement, schedule=fmg.Schedule(**options), max_blocks=max_blocks)
        cuts = [0, *sorted(int(cut) for cut in rng.integers(0, TOKENS + 1, world_size - 1)), TOKENS]
        parts = [rows_of(case, slice(*ends)) for ends in zip(cuts, cuts[1:])]
        for clean in (True, False):
            outputs = ranks.run(problem, parts, clean=clean)
            assert np.concatenate(outputs).tobytes() == whole.tobytes(), f"{placement}, tokens cut at {cuts}"


@pytest.mark.parametrize(("way", "changes"), [(way, changes) for way in TILES for changes in TILES[way]])
def test_bits_of_a_token_do_not_depend_on_the_tile(way: str, changes: str) -> None:
    problem, case, whole, tile = whole_batch(way, shape=WIDE)
    other = tile.replace(**TILES[way][changes])
    assert other != tile and (other.block_k, other.math, other.program) == (tile.block_k, tile.math, tile.program)
    ranks = Ranks(problem.spec, other)
    for tokens in (TOKENS, 17):
        (y,) = ranks.run(problem, [rows_of(case, slice(tokens))])
        different = int((y != whole[:tokens]).any(1).sum())
        assert y.tobytes() == whole[:tokens].tobytes(), f"{different} of {tokens} tokens have other bits"
