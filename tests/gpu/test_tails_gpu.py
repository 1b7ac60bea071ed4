"""Activations where they vanish, and float16 where it ends, on a GPU: every dtype, program, activation and window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import BOUNDS, Problem, Ranks, build, make, relative_error, runs_here

import flashmoe_gen as fmg

from limits import (  # isort: skip  (ranks makes the folder of the host tests known)
    ACTIVATIONS, ENDS, WIDTH, WINDOWS, LargeIntermediates, LargeRows, ends, exact_all, identity_layer, peaks, tolerance,
    window_inputs,
)  # fmt: skip

pytestmark = pytest.mark.gpu

FLOAT16 = ["float16/wgmma", "float16/mma"]


def plain(way: str, name: str, experts: int = 1, **fields: Any) -> tuple[fmg.MoESpec, fmg.TileConfig]:
    return make(way, shape=(WIDTH, WIDTH, experts, 1), mlp="vanilla", activation=name, **fields)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compile on all cores."""
    every = [
        plain(way, name, bias=bias)
        for way in BOUNDS
        if runs_here(way)
        for name in ACTIVATIONS
        for bias in (False, True)
    ]
    build([(spec, {"tile": tile}) for spec, tile in every])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", BOUNDS)
def test_every_window(way: str, name: str) -> None:
    spec, tile = plain(way, name)
    problem = Problem(spec)
    problem.weights = identity_layer(spec)
    x = window_inputs(spec)
    case = (x, np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32))
    (y,) = Ranks(spec, tile).run(problem, [case])
    worst = 0.0
    for start, z, got in zip(WINDOWS, np.split(x, len(WINDOWS)), np.split(y, len(WINDOWS)), strict=True):
        want = exact_all(name, z)
        error = relative_error(got, want)
        assert error <= tolerance(spec.dtype, BOUNDS[way], want), (start, error)
        worst = max(worst, error)
    print(f"\n{way}, {name}: worst relative error of a window {worst:.2e}")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", BOUNDS)
def test_the_ends(way: str, name: str) -> None:
    spec, tile = plain(way, name, ENDS, bias=True)
    problem = Problem(spec)
    values, problem.weights, want = ends(spec)
    case = (
        np.zeros((ENDS, WIDTH), values.dtype),
        np.arange(ENDS, dtype=np.int32)[:, None],
        np.ones((ENDS, 1), np.float32),
    )
    (y,) = Ranks(spec, tile).run(problem, [case])
    np.testing.assert_allclose(y[:, 0].astype(np.float64), want, rtol=BOUNDS[way])


@pytest.mark.parametrize(("world_size", "combine"), [(1, "route"), (2, "route"), (2, "rank")])
@pytest.mark.parametrize("kind", [LargeRows, LargeIntermediates])
@pytest.mark.parametrize("way", FLOAT16)
def test_what_passes_the_largest_number_comes_back(way: str, kind: Any, world_size: int, combine: str) -> None:
    spec, tile = make(
        way,
        shape=(144, 208, 7, 3),
        mlp="vanilla",
        activation="identity",
        bias=True,
        world_size=world_size,
        max_tokens=150,
    )
    problem = kind(spec)
    inputs = [problem.case(150 - 13 * rank, rank) for rank in range(world_size)]
    row, middle = peaks(problem, inputs[0])
    assert (row if kind is LargeRows else middle) > 1.05 * 65504
    for y, case in zip(Ranks(spec, tile, schedule=fmg.Schedule(combine=combine)).run(problem, inputs), inputs, strict=True):
        assert relative_error(y, problem.reference(*case)) <= BOUNDS[way]
