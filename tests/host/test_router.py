"""The router on the host: against the float64 reference, and bit for bit against itself.

Low precision may swap experts whose selection scores are closer than the rounding errors; ``Judge`` knows how close that
is, and refuses everything else. On grid data every logit is exact, so there ties are exact too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_judge import Judge, Problem, check, make_spec, run

import flashmoe_gen as fmg

DTYPES = ("bfloat16", "float16", "float32", "float64")
EXPERTS = (1, 2, 7, 60, 64, 128, 256, 1024)
# One kernel per entry and dtype; everything else is a launch argument.
KERNELS = (
    {"hidden_size": 64, "top_k": 2},
    {"hidden_size": 200, "top_k": 6, "renormalize": False, "group_score": "top2_sum", "routed_scale": 16.0},
    {"hidden_size": 72, "top_k": 8, "scoring": "sigmoid", "routed_scale": 2.5},
    {"hidden_size": 24, "top_k": 32, "scoring": "sigmoid", "group_score": "max"},
    {"hidden_size": 8, "top_k": 1, "scoring": "sigmoid", "renormalize": False},
)


@st.composite
def cases(draw: Any) -> tuple[fmg.MoESpec, Problem, int]:
    fields = dict(draw(st.sampled_from(KERNELS)))
    experts = draw(st.sampled_from([e for e in EXPERTS if e >= fields["top_k"]]))
    pairs = fields.get("group_score", "max" if fields.get("scoring") != "sigmoid" else "top2_sum") == "top2_sum"
    shapes = [
        (groups, top)
        for groups in (1, 2, 4, 7, 8, 30, 32, experts)
        if experts % groups == 0 and (groups == 1 or not pairs or experts // groups >= 2)
        for top in {1, 2, 4, groups // 2, groups}
        if 1 <= top <= groups and experts // groups * top >= fields["top_k"]
    ]
    fields["num_groups"], fields["top_groups"] = draw(st.sampled_from(shapes))
    spec = make_spec(experts, draw(st.sampled_from(DTYPES)), **fields)
    options = {name: draw(st.booleans()) for name in ("grid", "twins", "logit_bias", "selection_bias")}
    problem = Problem.random(spec, draw(st.sampled_from((0, 1, 5, 33))), draw(st.integers(0, 2**32 - 1)), **options)
    return spec, problem, draw(st.sampled_from((1, 2, 7, 40)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_agrees_with_the_reference(case: tuple[fmg.MoESpec, Problem, int]) -> None:
    spec, problem, threads = case
    check(spec, problem, *run(spec, problem, threads=threads))


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_bits_depend_on_the_token_alone(case: tuple[fmg.MoESpec, Problem, int], random: Any) -> None:
    spec, problem, threads = case
    ids, weights = run(spec, problem)
    tokens = len(problem.x)
    order = random.sample(range(tokens), tokens)
    for rows, workers in ((order, threads), (order[: tokens // 2], 1), (order[:1] * 3, 2)):
        some_ids, some_weights = run(spec, problem, rows=np.array(rows, int), threads=workers)
        assert some_ids.tobytes() == ids[rows].tobytes()
        assert some_weights.tobytes() == weights[rows].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_exact_ties_go_to_the_lowest_expert(dtype: str, experts: int) -> None:
    spec = make_spec(experts, dtype, top_k=min(experts, 2))
    problem = Problem.random(spec, 33, seed=experts, grid=True)
    problem.w[:] = problem.w[0]
    ids, weights = run(spec, problem)
    assert (ids == np.arange(spec.top_k)).all()
    assert (weights == np.float32(1) / np.float32(spec.top_k)).all()
    problem = Problem.random(spec, 33, seed=experts, grid=True)  # few distinct logits
    assert (run(spec, problem)[0] == problem.reference(spec)[0]).all()


def test_experts_whose_scores_round_to_one_number_do_not_tie() -> None:
    spec = make_spec(4, scoring="sigmoid", top_k=2)
    problem = Problem(np.ones((1, 64), np.float32), np.repeat(np.float32([[20], [30], [-120], [25]]) / 64, 64, axis=1))
    assert run(spec, problem)[0].tolist() == [[1, 3]]
    problem.w -= np.float32(150 / 64)  # and where they underflow; their sum is no divisor then
    ids, weights = run(spec, problem)
    assert ids.tolist() == [[1, 3]] and weights.tolist() == [[0, 0]]


@pytest.mark.parametrize("shift", [-500, 500])
def test_large_logits_do_not_overflow(shift: int) -> None:
    spec = make_spec(4, renormalize=False, top_k=4)
    logits = np.float32([0, 2, -1, 1]) + shift
    problem = Problem(np.ones((1, 64), np.float32), np.repeat(logits[:, None] / 64, 64, axis=1))
    ids, weights = run(spec, problem)
    assert ids.tolist() == [[1, 3, 0, 2]]
    np.testing.assert_allclose(weights, problem.reference(spec)[1], rtol=1e-4)


def test_groups_tie_to_the_lowest_group() -> None:
    for score in ("max", "top2_sum"):
        spec = make_spec(32, num_groups=8, top_groups=2, group_score=score, top_k=6)
        problem = Problem.random(spec, 5, seed=1, grid=True)
        problem.w = np.tile(problem.w[:4], (8, 1))
        ids, _ = run(spec, problem)
        assert (ids < 8).all()
        assert (ids == problem.reference(spec)[0]).all()


def test_a_selection_bias_chooses_but_does_not_weigh() -> None:
    spec = make_spec(64, scoring="sigmoid", top_k=8)
    problem = Problem.random(spec, 33, seed=3, selection_bias=True)
    problem.selection_bias[:] = -np.inf
    problem.selection_bias[5:60:5] = 10.0 * np.arange(11)
    ids, weights = run(spec, problem)
    assert (ids == np.arange(55, 15, -5)).all()
    np.testing.assert_allclose(weights, problem.reference(spec)[1], rtol=1e-5)


def test_num_tokens_limits_the_call() -> None:
    spec = make_spec()
    problem = Problem.random(spec, 33, seed=4)
    all_ids, all_weights = run(spec, problem)
    for limit, count in ((-3, 0), (0, 0), (1, 1), (32, 32), (33, 33), (1000, 33)):
        ids, weights = run(spec, problem, limit=limit, threads=3)
        assert (ids[:count] == all_ids[:count]).all() and (ids[count:] == -7).all()
        assert weights[:count].tobytes() == all_weights[:count].tobytes() and np.isnan(weights[count:]).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_and_infinity_stay_in_their_token(scoring: str) -> None:
    spec = make_spec(8, scoring=scoring, top_k=8, num_groups=2, top_groups=2)
    problem = Problem.random(spec, 5, seed=5)
    ids, weights = run(spec, problem)
    problem.x[1, 3], problem.x[3, 0] = np.nan, np.inf
    bad_ids, bad_weights = run(spec, problem)
    assert (np.sort(bad_ids, axis=1) == np.arange(8)).all()
    assert np.isnan(bad_weights[1]).all()
    for token in (0, 2, 4):
        assert (bad_ids[token] == ids[token]).all() and bad_weights[token].tobytes() == weights[token].tobytes()


def test_the_text_depends_on_nothing_that_is_an_argument() -> None:
    def text(**fields: Any) -> str:
        return fmg.generate(make_spec(**fields), arch="host", kernel="router").text

    plain = text()
    others = ({"num_experts": 7}, {"num_groups": 8, "top_groups": 4}, {"mlp": "vanilla"}, {"batch_invariant": True})
    assert all(text(**fields) == plain for fields in others)
    assert text(scoring="sigmoid") != plain


def test_the_layer_routes_like_the_kernel() -> None:
    spec = make_spec(60, "bfloat16", top_k=6, renormalize=False, scoring="sigmoid")
    problem = Problem.random(spec, 33, seed=6, logit_bias=True, selection_bias=True)
    with fmg.MoELayer(spec, target="host") as layer:
        got = layer.route(problem.x, problem.w, logit_bias=problem.logit_bias, selection_bias=problem.selection_bias)
    for ours, kernels in zip(got, run(spec, problem), strict=True):
        assert ours.tobytes() == kernels.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_can_say_no(dtype: str) -> None:
    spec = make_spec(64, dtype, top_k=6, num_groups=8, top_groups=4)
    problem = Problem.random(spec, 33, seed=7)
    ids, weights = problem.reference(spec)
    judge = Judge(spec, problem)
    refused = []
    for token in range(33):
        assert judge.accepts_ids(token, ids[token])
        assert judge.accepts_weights(token, ids[token], weights[token])
        assert not judge.accepts_weights(token, ids[token], weights[token] * 1.001)
        swapped = ids[token][[1, 0, 2, 3, 4, 5]]
        outside = [e for e in range(64) if e // 8 not in set(ids[token] // 8)]
        for wrong in (swapped, *([*ids[token][:5], e] for e in outside)):
            refused.append(not judge.accepts_ids(token, np.array(wrong)))
        assert not judge.accepts_ids(token, ids[token][[0, 0, 2, 3, 4, 5]])
    assert np.mean(refused) > 0.99  # a swap may be within the rounding error, but hardly ever is
    spec = make_spec(32, dtype, top_k=32)
    problem = Problem.random(spec, 1, seed=8)
    problem.w[9] = problem.w[1]
    tied = Judge(spec, problem)
    order = np.argsort(-tied.value[0], kind="stable")
    places = np.sort(np.flatnonzero((order == 1) | (order == 9)))
    order[places] = 1, 9
    assert tied.accepts_ids(0, order)
    order[places] = 9, 1
    assert not tied.accepts_ids(0, order)
