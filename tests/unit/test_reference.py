"""The reference: against layers of transformers (tests/golden), against loops over the formula, and its properties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from flashmoe_gen import reference
from flashmoe_gen.errors import SpecError
from flashmoe_gen.spec import MoESpec

GOLDENS = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
EXPERT_ARRAYS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
Arrays = dict[str, npt.NDArray[Any]]


def make_spec(**changes: Any) -> MoESpec:
    base = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "top_k": 2, "dtype": "float64"}
    return MoESpec(**{**base, "max_tokens": 64, **changes})


def make_experts(spec: MoESpec, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    count, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (count, inner, hidden),
        "up": (count, inner, hidden),
        "down": (count, hidden, inner),
    }
    if spec.bias:
        shapes |= {f"{name}_bias": shape[:2] for name, shape in shapes.items()}
    return {
        name: rng.normal(0, 0.5, shape)
        for name, shape in shapes.items()
        if spec.mlp == "gated" or not name.startswith("gate")
    }


def make_routes(spec: MoESpec, tokens: int, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed + 1)
    x = rng.normal(size=(tokens, spec.hidden_size))
    ids, weights = reference.route(spec, x, rng.normal(0, 0.5, (spec.num_experts, spec.hidden_size)))
    return x, ids, weights


def by_expert(ids: npt.NDArray[Any], weights: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)


def relative_error(have: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


# --- layers of transformers ---


@pytest.fixture(params=GOLDENS, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Arrays:
    with np.load(request.param) as file:
        return dict(file)


def golden_spec(golden: Arrays) -> MoESpec:
    return MoESpec.from_hf_config(json.loads(str(golden["config"])), max_tokens=64)


def test_goldens_exist() -> None:
    assert len(GOLDENS) == 20
    assert max(path.stat().st_size for path in GOLDENS) < 100_000


def test_route_agrees_with_transformers(golden: Arrays) -> None:
    spec = golden_spec(golden)
    biases = {name: golden.get(name) for name in ("logit_bias", "selection_bias")}
    ids, weights = by_expert(*reference.route(spec, golden["x"], golden["router_weight"], **biases))
    wanted_ids, wanted = by_expert(golden["topk_ids"], golden["topk_weights"])
    np.testing.assert_array_equal(ids, wanted_ids)
    # all but gpt-oss compute scores in float32
    np.testing.assert_allclose(weights, wanted, rtol=1e-12 if "logit_bias" in golden else 1e-6)
    for name, bias in biases.items():
        if bias is not None:  # the biases of the golden files do change the choice
            without, _ = by_expert(
                *reference.route(spec, golden["x"], golden["router_weight"], **{**biases, name: None})
            )
            assert (without != ids).any()


def test_moe_agrees_with_transformers(golden: Arrays) -> None:
    experts = {name: golden[name] for name in EXPERT_ARRAYS if name in golden}
    y = reference.moe(golden_spec(golden), golden["x"], golden["topk_ids"], golden["topk_weights"], **experts)
    assert relative_error(y, golden["y"]) < 1e-13


def test_route_and_moe_agree_with_transformers(golden: Arrays) -> None:
    spec = golden_spec(golden)
    biases = {name: golden.get(name) for name in ("logit_bias", "selection_bias")}
    routes = reference.route(spec, golden["x"], golden["router_weight"], **biases)
    experts = {name: golden[name] for name in EXPERT_ARRAYS if name in golden}
    assert relative_error(reference.moe(spec, golden["x"], *routes, **experts), golden["y"]) < 1e-6


# --- routing ---


def test_ties_go_to_the_lowest_expert() -> None:
    spec = make_spec(top_k=3)
    ids, weights = reference.route(spec, np.ones((2, 16)), np.zeros((6, 16)))
    assert ids.dtype == np.int32 and weights.dtype == np.float64
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights, 1 / 3)
    ids, _ = reference.route(spec, np.ones((1, 16)), np.zeros((6, 16)), logit_bias=np.array([0, 1, 0, 2, 1, 0]))
    np.testing.assert_array_equal(ids, [[3, 1, 4]])


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_tied_groups_go_to_the_lowest(scoring: str, group_score: str) -> None:
    spec = make_spec(num_experts=8, top_k=3, num_groups=4, top_groups=2, group_score=group_score, scoring=scoring)
    ids, _ = reference.route(spec, np.ones((1, 16)), np.zeros((8, 16)))
    np.testing.assert_array_equal(ids, [[0, 1, 2]])


def test_scores_that_round_to_one_number_do_not_tie() -> None:
    spec = make_spec(scoring="sigmoid", top_k=1)
    ids, weights = reference.route(spec, np.zeros((1, 16)), np.zeros((6, 16)), logit_bias=np.arange(50.0, 56.0))
    assert (ids[0, 0], weights[0, 0]) == (5, 1.0)


def test_group_scores() -> None:
    # group 0 holds the best expert, group 1 the best pair
    logits = np.array([3.0, -3.0, 2.0, 2.5, 0.0, 0.1])
    for group_score, chosen in (("max", [0, 1]), ("top2_sum", [3, 2])):
        spec = make_spec(scoring="sigmoid", num_groups=3, group_score=group_score)
        ids, _ = reference.route(spec, np.zeros((1, 16)), np.zeros((6, 16)), logit_bias=logits)
        np.testing.assert_array_equal(ids, [chosen])


def test_selection_bias_chooses_but_does_not_weigh() -> None:
    spec = make_spec(scoring="sigmoid", renormalize=False, top_k=1)
    bias = np.array([0, 0, 0, 0, 0, 0.5])
    ids, weights = reference.route(spec, np.zeros((1, 16)), np.zeros((6, 16)), selection_bias=bias)
    assert (ids[0, 0], weights[0, 0]) == (5, pytest.approx(0.5, abs=1e-15))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_route_against_a_loop(scoring: str, num_groups: int, biased: bool) -> None:
    spec = make_spec(
        scoring=scoring, num_groups=num_groups, top_groups=min(2, num_groups), top_k=3, routed_scale=2.5, num_experts=9
    )
    rng = np.random.default_rng(5)
    x, router = rng.normal(size=(20, 16)), rng.normal(size=(9, 16))
    bias = rng.normal(0, 0.3, 9) if biased else None
    ids, weights = reference.route(spec, x, router, selection_bias=bias)
    share = 9 // num_groups
    for token in range(20):
        logits = [math.fsum(a * b for a, b in zip(x[token], row, strict=True)) for row in router]
        total = math.fsum(map(math.exp, logits))
        scores = [math.exp(z) / total if scoring == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
        choice = [score + (0 if bias is None else bias[expert]) for expert, score in enumerate(scores)]
        used = 1 if spec.group_score == "max" else 2
        groups = [sum(sorted(choice[g * share : (g + 1) * share])[-used:]) for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: -groups[g])[: spec.top_groups]
        allowed = [expert for expert in range(9) if expert // share in best]
        chosen = sorted(allowed, key=lambda expert: -choice[expert])[:3]
        assert chosen == ids[token].tolist()
        norm = sum(scores[expert] for expert in chosen)
        np.testing.assert_allclose(weights[token], [2.5 * scores[expert] / norm for expert in chosen], rtol=1e-12)


def test_weights_of_hopeless_scores_are_finite() -> None:
    spec = make_spec(scoring="sigmoid")
    _, weights = reference.route(spec, np.zeros((1, 16)), np.zeros((6, 16)), logit_bias=np.full(6, -2000.0))
    np.testing.assert_array_equal(weights, [[0.0, 0.0]])
    for scoring in ("softmax", "sigmoid"):
        _, weights = reference.route(
            make_spec(scoring=scoring), np.zeros((1, 16)), np.zeros((6, 16)), logit_bias=[900, -900, 899, 0, 0, 0]
        )
        assert weights.sum() == pytest.approx(1.0)


# --- experts ---


def scalar_activation(name: str, z: float) -> float:
    if name == "silu":
        return z / (1 + math.exp(-z))
    if name == "gelu":
        return z * 0.5 * math.erfc(-z / math.sqrt(2))
    if name == "gelu_tanh":
        return z / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return max(z, 0.0) if name == "relu" else z


def scalar_moe(spec: MoESpec, x: Any, ids: Any, weights: Any, experts: Arrays) -> npt.NDArray[np.float64]:
    """The formula of MoESpec's docstring, one number at a time."""
    y = np.zeros((len(x), spec.hidden_size))
    taken = [0] * spec.num_experts

    def linear(name: str, expert: int, row: list[float]) -> list[float]:
        bias = experts[f"{name}_bias"][expert] if spec.bias else [0.0] * len(experts[name][expert])
        return [
            math.fsum(a * b for a, b in zip(r, row, strict=True)) + c
            for r, c in zip(experts[name][expert], bias, strict=True)
        ]

    for token, slot in np.ndindex(ids.shape):
        expert, weight = int(ids[token, slot]), float(weights[token, slot])
        if expert < 0:
            continue
        taken[expert] += 1
        if spec.capacity is not None and taken[expert] > spec.capacity:
            continue
        row = [v * weight if spec.weight_on == "input" else v for v in x[token]]
        z_up = linear("up", expert, row)
        z = linear("gate", expert, row) if spec.mlp == "gated" else z_up
        limit = spec.gate_limit or math.inf
        inner = [
            spec.swish_alpha
            * scalar_activation(spec.activation, spec.swish_beta * min(g, limit))
            * (max(-limit, min(u, limit)) + spec.up_offset if spec.mlp == "gated" else 1.0)
            for g, u in zip(z, z_up, strict=True)
        ]
        y[token] += np.array(linear("down", expert, inner)) * (weight if spec.weight_on == "output" else 1.0)
    return y


VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh", "bias": True},
    "relu": {"activation": "relu"},
    "identity": {"activation": "identity"},
    "scaled": {"swish_alpha": 0.6, "swish_beta": 1.7},
    "gpt_oss": {"bias": True, "gate_limit": 0.8, "up_offset": 1.0, "swish_beta": 1.702, "swish_alpha": 1 / 1.702},
    "vanilla": {"mlp": "vanilla", "activation": "gelu"},
    "vanilla_bias": {"mlp": "vanilla", "activation": "silu", "bias": True, "swish_alpha": 2.0, "swish_beta": 0.5},
    "input": {"weight_on": "input", "bias": True},
    "capacity": {"capacity": 2},
    "capacity_1": {"capacity": 1, "weight_on": "input"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_moe_against_a_loop(variant: str) -> None:
    spec = make_spec(**VARIANTS[variant])
    experts = make_experts(spec)
    x, ids, weights = make_routes(spec, 9)
    ids[2, 0] = ids[5] = -1
    ids[3, 1] = ids[3, 0]  # one expert twice for one token
    weights[5] = np.nan  # the weight of a masked route is never read
    y = reference.moe(spec, x, ids, weights, **experts)
    np.testing.assert_allclose(y, scalar_moe(spec, x, ids, weights, experts), rtol=1e-11, atol=1e-12)
    assert not y[5].any()


@pytest.mark.parametrize("capacity", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("seed", range(5))
def test_drops_against_counting(capacity: int | None, seed: int) -> None:
    spec = make_spec(capacity=capacity)
    ids = np.random.default_rng(seed).integers(-1, 6, (20, 2))
    counts = [int((ids == expert).sum()) for expert in range(6)]
    expected = 0 if capacity is None else sum(max(0, count - capacity) for count in counts)
    assert reference.drops(spec, ids) == expected
    assert reference.drops(spec, np.asfortranarray(ids)) == expected


def test_capacity_keeps_the_first_tokens() -> None:
    spec, full = make_spec(capacity=3, top_k=1), make_spec(top_k=1)
    experts = make_experts(spec)
    x, weights = np.random.default_rng(0).normal(size=(8, 16)), np.ones((8, 1))
    ids = np.asfortranarray(np.full((8, 1), 4))
    y, wanted = (reference.moe(s, x, ids, weights, **experts) for s in (spec, full))
    np.testing.assert_array_equal(y[3:], 0.0)
    np.testing.assert_allclose(y[:3], wanted[:3])


@pytest.mark.parametrize("seed", range(3))
def test_a_token_depends_on_nothing_but_itself(seed: int) -> None:
    spec = make_spec()
    experts = make_experts(spec, seed)
    x, ids, weights = make_routes(spec, 11, seed)
    y = reference.moe(spec, x, ids, weights, **experts)
    order = np.random.default_rng(seed).permutation(11)
    shuffled = reference.moe(spec, x[order], ids[order], weights[order], **experts)
    np.testing.assert_allclose(shuffled, y[order], rtol=1e-12, atol=1e-13)
    alone = reference.moe(spec, x[4:5], ids[4:5], weights[4:5], **experts)
    np.testing.assert_allclose(alone, y[4:5], rtol=1e-12, atol=1e-13)


def test_output_is_linear_in_the_weights_and_the_order_of_routes_is_free() -> None:
    spec = make_spec(top_k=3)
    experts = make_experts(spec)
    x, ids, weights = make_routes(spec, 7)
    y = reference.moe(spec, x, ids, weights, **experts)
    np.testing.assert_allclose(reference.moe(spec, x, ids, -3 * weights, **experts), -3 * y, rtol=1e-12)
    np.testing.assert_allclose(reference.moe(spec, x, ids[:, ::-1], weights[:, ::-1], **experts), y, rtol=1e-11)
    masked = reference.moe(spec, x, np.where(ids == 2, -7, ids), weights, **experts)
    np.testing.assert_allclose(
        masked, reference.moe(spec, x, ids, np.where(ids == 2, 0.0, weights), **experts), rtol=1e-12
    )


def test_weight_on_input_equals_output_for_a_linear_expert() -> None:
    spec = make_spec(mlp="vanilla", activation="identity")
    experts = make_experts(spec)
    routes = make_routes(spec, 7)
    y = reference.moe(spec, *routes, **experts)
    np.testing.assert_allclose(reference.moe(spec.replace(weight_on="input"), *routes, **experts), y, rtol=1e-11)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_narrow_types_and_sequences_of_experts(dtype: Any) -> None:
    spec = make_spec(bias=True)
    experts = {name: array.astype(dtype) for name, array in make_experts(spec).items()}
    x, ids, weights = make_routes(spec, 5)
    x = x.astype(dtype)
    y = reference.moe(spec, x, ids, weights, **experts)
    wide = {name: array.astype(np.float64) for name, array in experts.items()}
    assert y.dtype == np.float64
    np.testing.assert_array_equal(reference.moe(spec, x.astype(np.float64), ids, weights, **wide), y)
    np.testing.assert_array_equal(
        reference.moe(spec, x, ids, weights, **{name: list(array) for name, array in experts.items()}), y
    )
    router = wide["up"][:, 0].astype(dtype)
    narrow_routes, routes = (reference.route(spec, x.astype(t), router.astype(t)) for t in (dtype, np.float64))
    np.testing.assert_array_equal(narrow_routes[0], routes[0])
    np.testing.assert_array_equal(narrow_routes[1], routes[1])


@pytest.mark.parametrize("fields", [{}, {"num_groups": 3, "scoring": "sigmoid"}, {"capacity": 1}])
def test_no_tokens(fields: dict[str, Any]) -> None:
    spec = make_spec(**fields)
    ids, weights = reference.route(spec, np.zeros((0, 16)), np.zeros((6, 16)), selection_bias=np.zeros(6))
    assert ids.shape == weights.shape == (0, 2)
    assert reference.moe(spec, np.zeros((0, 16)), ids, weights, **make_experts(spec)).shape == (0, 16)
    assert reference.drops(spec, ids) == 0


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((3, 15))}, r"x of shape \(3, 15\) is not valid. Must be \[T, 16\]"),
        ({"topk_ids": np.zeros((3, 3), int)}, r"topk_ids of shape \(3, 3\) is not valid. Must be \[T, 2\]"),
        ({"topk_ids": np.zeros((3, 2))}, "topk_ids of dtype float64 is not valid"),
        ({"topk_ids": np.full((3, 2), 6)}, "topk_ids holds 6, .* below num_experts=6"),
        ({"topk_ids": np.zeros((4, 2), int)}, "topk_ids holds 4 tokens, but x holds 3"),
        ({"topk_weights": np.zeros((2, 2))}, "topk_weights holds 2 tokens, but x holds 3"),
        ({"gate": None}, "gate is missing: the spec has mlp='gated' and bias=False"),
        ({"up_bias": np.zeros((6, 8))}, "up_bias is not valid: the spec has mlp='gated' and bias=False"),
        ({"down": np.zeros((5, 16, 8))}, "down holds 5 experts. Must hold num_experts=6"),
        ({"down": np.zeros((6, 8, 16))}, r"down\[0\] of shape \(8, 16\) is not valid. Must be \[16, 8\]"),
    ],
)
def test_moe_refuses(changes: dict[str, Any], message: str) -> None:
    spec = make_spec()
    call = {"x": np.zeros((3, 16)), "topk_ids": np.zeros((3, 2), int), "topk_weights": np.zeros((3, 2))}
    with pytest.raises(SpecError, match=message):
        reference.moe(spec, **{**call, **make_experts(spec), **changes})


def test_vanilla_refuses_a_gate_and_bias_requires_biases() -> None:
    x, ids, weights = np.zeros((1, 16)), np.zeros((1, 2), int), np.zeros((1, 2))
    experts = make_experts(make_spec())
    with pytest.raises(SpecError, match="gate is not valid: the spec has mlp='vanilla'"):
        reference.moe(make_spec(mlp="vanilla"), x, ids, weights, **experts)
    with pytest.raises(SpecError, match="gate_bias is missing: the spec has mlp='gated' and bias=True"):
        reference.moe(make_spec(bias=True), x, ids, weights, **experts)


@pytest.mark.parametrize("name", ["router_weight", "logit_bias", "selection_bias"])
def test_route_refuses(name: str) -> None:
    arrays: dict[str, Any] = {"x": np.zeros((2, 16)), "router_weight": np.zeros((6, 16))}
    with pytest.raises(SpecError, match=rf"{name} of shape \(3,\) is not valid"):
        reference.route(make_spec(), **{**arrays, name: np.zeros(3)})


def test_drops_refuses() -> None:
    with pytest.raises(SpecError, match="topk_ids holds 6"):
        reference.drops(make_spec(), np.full((1, 2), 6))
