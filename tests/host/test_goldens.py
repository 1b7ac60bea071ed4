"""The layer's router and experts against outputs of transformers' own modules, family by family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from world import prebuild, relative_error

import flashmoe_gen as fmg

GOLDENS = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def golden_spec(path: Path) -> fmg.MoESpec:
    with np.load(path) as file:
        return fmg.MoESpec.from_hf_config(json.loads(str(file["config"])), max_tokens=64)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    specs = [golden_spec(path) for path in GOLDENS]
    prebuild([(spec, kernel, None) for spec in specs for kernel in ("moe", "router")])


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_layer_agrees_with_transformers(path: Path) -> None:
    with np.load(path) as file:
        golden = {name: array for name, array in file.items() if name != "config"}
    spec = golden_spec(path)
    assert spec.dtype == "float64"
    exact = {name: array.astype(np.float64) for name, array in golden.items()}
    biases = {name: golden[name].astype(np.float32) for name in ("logit_bias", "selection_bias") if name in golden}
    experts = fmg.Experts(**{name: exact[name] for name in WEIGHTS if name in exact})
    with fmg.MoELayer(spec, target="host") as layer:
        ids, weights = layer.route(exact["x"], exact["router_weight"], **biases)
        np.testing.assert_array_equal(np.sort(ids, 1), np.sort(golden["topk_ids"], 1))
        y = layer(exact["x"], ids, weights, experts)
    assert relative_error(y, golden["y"]) < 3e-7  # weights are float32


@pytest.mark.parametrize("layout", ["concat", "interleaved"])
def test_joined_gate_and_up(layout: str) -> None:
    path = next(path for path in GOLDENS if path.stem == "gpt_oss")
    with np.load(path) as file:
        golden = {name: array for name, array in file.items() if name != "config"}
    spec = golden_spec(path)
    exact = {name: array.astype(np.float64) for name, array in golden.items()}

    def join(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        if layout == "concat":
            return np.concatenate([gate, up], 1)
        return np.stack([gate, up], 2).reshape(len(gate), -1, *gate.shape[2:])

    joined = fmg.Experts(
        gate_up=join(exact["gate"], exact["up"]),
        gate_up_bias=join(exact["gate_bias"], exact["up_bias"]),
        gate_up_layout=layout,  # type: ignore[arg-type]
        down=exact["down"],
        down_bias=exact["down_bias"],
    )
    with fmg.MoELayer(spec, target="host") as layer:
        y = layer(exact["x"], golden["topk_ids"], golden["topk_weights"].astype(np.float32), joined)
    assert relative_error(y, golden["y"]) < 3e-7
