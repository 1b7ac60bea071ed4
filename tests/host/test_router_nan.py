"""The router's choice where scores are NaN or infinite: that of the reference, wherever in its group such an expert stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_judge import Problem, make_spec, run

import flashmoe_gen as fmg

SPECIAL = [np.nan, np.inf, -np.inf]
LOGITS = [*SPECIAL, 0.25, 1.0, 2.5, 4.0]  # no two sums of scores are equal but those of equal logits
BIASES = [*SPECIAL, 0.5, 0.5]
EXPERTS = 12
GROUPS = [(1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (4, 4)]
KERNELS = [
    {"scoring": "softmax", "group_score": "max"},
    {"scoring": "softmax", "group_score": "top2_sum"},
    {"scoring": "sigmoid", "group_score": "max", "renormalize": False},
    {"scoring": "sigmoid", "group_score": "top2_sum"},
    {"scoring": "sigmoid", "group_score": "top2_sum", "dtype": "float64"},
]


def problem(spec: fmg.MoESpec, logits: Any, biases: Any) -> Problem:
    zeros = np.zeros((spec.num_experts, spec.hidden_size), spec.element.numpy)
    biases = None if biases is None else np.float32(biases)
    return Problem(zeros[:1], zeros, np.float32(logits), biases)


def keys(case: Problem, spec: fmg.MoESpec) -> np.ndarray:
    """What experts are compared by, as one number where they tie."""
    logits = case.logit_bias.astype(np.float64)
    if case.selection_bias is None:
        return logits
    with np.errstate(all="ignore"):
        powers = np.exp(logits - logits.max())
        scores = powers / powers.sum() if spec.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        return scores + case.selection_bias


@pytest.mark.parametrize("fields", KERNELS, ids=lambda fields: "-".join(map(str, fields.values())))
@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_pattern(fields: dict[str, Any], data: st.DataObject) -> None:
    groups, top = data.draw(st.sampled_from(GROUPS))
    spec = make_spec(EXPERTS, hidden_size=8, top_k=4, num_groups=groups, top_groups=top, **fields)
    patterns = [st.lists(st.sampled_from(values), min_size=EXPERTS, max_size=EXPERTS) for values in (LOGITS, BIASES)]
    case = problem(spec, data.draw(patterns[0]), data.draw(st.none() | patterns[1]))
    ids, weights = run(spec, case)
    want_ids, want_weights = case.reference(spec)
    assert ids.tolist() == want_ids.tolist()
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)

    share = EXPERTS // groups
    order = np.concatenate([g * share + np.array(data.draw(st.permutations(range(share)))) for g in range(groups)])
    moved = problem(spec, case.logit_bias[order], None if case.selection_bias is None else case.selection_bias[order])
    others, _ = run(spec, moved)
    assert (others // share).tolist() == (ids // share).tolist()
    np.testing.assert_array_equal(keys(moved, spec)[others], keys(case, spec)[ids])


@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("place", range(4))
def test_one_nan_costs_its_group_nothing_but_that_expert(score: str, place: int) -> None:
    spec = make_spec(16, hidden_size=8, top_k=4, num_groups=4, top_groups=2, scoring="sigmoid", group_score=score)
    best = [5.0, 4.0, 3.0]
    best.insert(place, np.nan)
    ids, _ = run(spec, problem(spec, [*best, 1, 1.5, 0.5, 0.25, 0, 0, 0, 0, -3, -3, -3, -3], None))
    assert sorted(ids[0] // 4) == [0, 0, 0, 1]


def test_a_nan_of_a_chosen_group_comes_before_the_experts_of_others() -> None:
    spec = make_spec(8, hidden_size=8, top_k=4, num_groups=2, top_groups=1, scoring="sigmoid", group_score="max")
    ids, _ = run(spec, problem(spec, [1, 2, 3, 0, np.nan, 9, np.nan, -np.inf], None))
    assert ids.tolist() == [[5, 7, 4, 6]]
    ids, _ = fmg.reference.route(
        spec, np.zeros((1, 8)), np.zeros((8, 8)), logit_bias=[1, 2, 3, 0, np.nan, 9, np.nan, -np.inf]
    )
    assert ids.tolist() == [[5, 7, 4, 6]]
