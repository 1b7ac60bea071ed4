"""Activations where they vanish: no digit is lost, in any dtype, and nothing overflows on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from limits import ACTIVATIONS, ENDS, WIDTH, WINDOWS, ends, exact_all, identity_layer, tolerance, window_inputs
from world import BOUNDS, prebuild, relative_error

import flashmoe_gen as fmg


def make_spec(name: str, dtype: str, experts: int = 1, **fields: Any) -> fmg.MoESpec:
    fields = {"mlp": "vanilla", "activation": name, "max_tokens": 4 * len(WINDOWS), **fields}
    return fmg.MoESpec(WIDTH, WIDTH, experts, 1, dtype=dtype, **fields)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    specs = [make_spec(name, dtype, bias=bias) for name in ACTIVATIONS for dtype in BOUNDS for bias in (False, True)]
    prebuild([(spec, "moe", None) for spec in specs])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_window(name: str, dtype: str) -> None:
    spec = make_spec(name, dtype)
    x = window_inputs(spec)
    with fmg.MoELayer(spec, target="host") as layer:
        y = layer(
            x, np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32), fmg.Experts(**identity_layer(spec))
        )
    for start, z, got in zip(WINDOWS, np.split(x, len(WINDOWS)), np.split(y, len(WINDOWS)), strict=True):
        want = exact_all(name, z)
        assert relative_error(got, want) <= tolerance(dtype, BOUNDS[dtype], want), start


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_reference_in_every_window(name: str) -> None:
    spec = make_spec(name, "float64")
    x = np.concatenate([window_inputs(spec), np.linspace(-13, -9, WIDTH)[None]])
    y = fmg.reference.moe(spec, x, np.zeros((len(x), 1), int), np.ones((len(x), 1)), **identity_layer(spec))
    np.testing.assert_allclose(y, exact_all(name, x), rtol=1e-13)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_ends(name: str, dtype: str) -> None:
    spec = make_spec(name, dtype, ENDS, bias=True)
    values, weights, want = ends(spec)
    x, ids, ones = (
        np.zeros((ENDS, WIDTH), values.dtype),
        np.arange(ENDS, dtype=np.int32)[:, None],
        np.ones((ENDS, 1), np.float32),
    )
    with fmg.MoELayer(spec, target="host") as layer:
        y = layer(x, ids, ones, fmg.Experts(**weights))
    np.testing.assert_array_equal(y[:, 0].astype(np.float64), want)
    np.testing.assert_array_equal(fmg.reference.moe(spec, x, ids, ones, **weights)[:, 0], want)
