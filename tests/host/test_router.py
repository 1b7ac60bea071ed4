"""The router on the host: against the float64 reference, and bit for bit against itself.

Low precision may swap experts whose selection scores are closer than the rounding errors allow; :class:`Judge` knows how close
that is, and refuses everything else. On grid data every logit is exact, so there ties are exact too.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_gen as fmg
from flashmoe_gen.args import ROUTER_ARGS
from flashmoe_gen.launch.host import HostKernel

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


def make_spec(num_experts: int = 64, dtype: str = "float32", **fields: Any) -> fmg.MoESpec:
    return fmg.MoESpec(
        num_experts=num_experts, intermediate_size=64, max_tokens=64, dtype=dtype, **{"hidden_size": 64, "top_k": 2, **fields}
    )


@functools.cache
def kernel_of(digest_key: tuple[tuple[str, Any], ...]) -> HostKernel:
    return HostKernel.load(fmg.generate(make_spec(**dict(digest_key)), arch="host", kernel="router").compile())


def run(
    spec: fmg.MoESpec, problem: Problem, *, threads: int = 1, rows: Any = slice(None), limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One launch on poisoned outputs; ``limit`` goes through ``num_tokens``."""
    names = ("hidden_size", "top_k", "dtype", "scoring", "renormalize", "group_score", "routed_scale")
    kernel = kernel_of(tuple((name, getattr(spec, name)) for name in names))
    x = np.ascontiguousarray(problem.x[rows])
    ids = np.full((len(x), spec.top_k), -7, np.int32)
    weights = np.full((len(x), spec.top_k), np.nan, np.float32)
    logits = np.full((len(x), spec.num_experts), np.nan, np.float64 if spec.dtype == "float64" else np.float32)
    count = np.array([limit or 0], np.int32)
    args = ROUTER_ARGS.zeros()
    arrays = {"x": x, "router_weight": problem.w, "topk_ids": ids, "topk_weights": weights, "logits": logits}
    arrays |= {"logit_bias": problem.logit_bias, "selection_bias": problem.selection_bias}
    arrays["num_tokens"] = None if limit is None else count
    for name, array in arrays.items():
        args[name] = 0 if array is None else array.ctypes.data
    args["tokens"] = len(x)
    for name in ("num_experts", "num_groups", "top_groups"):
        args[name] = getattr(spec, name)
    kernel.launch(args, threads)
    return ids, weights


@dataclass
class Problem:
    x: np.ndarray
    w: np.ndarray
    logit_bias: np.ndarray | None = None
    selection_bias: np.ndarray | None = None
    exact: bool = False  # grid data: logits without any rounding, in every dtype

    @classmethod
    def random(
        cls, spec: fmg.MoESpec, tokens: int, seed: int, *, grid: bool = False, twins: bool = False, logit_bias: bool = False,
        selection_bias: bool = False,
    ) -> Problem:  # fmt: skip
        rng = np.random.default_rng(seed)
        e, h = spec.num_experts, spec.hidden_size

        def draw(*shape: int) -> np.ndarray:
            return rng.integers(-3, 4, shape) / 4 if grid else rng.standard_normal(shape)

        w = draw(e, h) if grid else draw(e, h) * 2 / np.sqrt(h)
        biases = [draw(e).astype(np.float32) if wanted else None for wanted in (logit_bias, selection_bias)]
        if twins:  # experts in random places share a row, and then their biases
            source = np.where(rng.random(e) < 0.5, rng.integers(0, e, e), np.arange(e))
            w = w[source]
            biases = [None if bias is None else bias[source] for bias in biases]
        dtype = spec.element.numpy
        return cls(draw(tokens, h).astype(dtype), w.astype(dtype), *biases, exact=grid)

    def reference(self, spec: fmg.MoESpec) -> tuple[np.ndarray, np.ndarray]:
        return fmg.reference.route(
            spec, self.x, self.w, logit_bias=self.logit_bias, selection_bias=self.selection_bias
        )  # fmt: skip


class Judge:
    """Float64 selection scores of a problem, each with a bound of the kernel's error."""

    def __init__(self, spec: fmg.MoESpec, problem: Problem) -> None:
        self.spec = spec
        x, w = problem.x.astype(np.float64), problem.w.astype(np.float64)
        zeros = np.zeros(spec.num_experts)
        logit_bias = zeros if problem.logit_bias is None else problem.logit_bias.astype(np.float64)
        selection_bias = zeros if problem.selection_bias is None else problem.selection_bias.astype(np.float64)
        unit = 2.0**-53 if spec.dtype == "float64" else 2.0**-24
        lanes = 8 if spec.dtype == "float64" else 16
        logits = x @ w.T + logit_bias
        # Sums of H / lanes terms and a tree over the lanes; the reference's own sums have H terms.
        growth = (spec.hidden_size / lanes + 6) * unit + spec.hidden_size * 2.0**-53
        slack = 0 * logits if problem.exact else growth * (abs(x) @ abs(w).T + abs(logit_bias))
        if spec.scoring == "softmax":
            shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
            self.scores = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
            grown = slack + slack.max(axis=1, keepdims=True, initial=0)
            self.relative = np.expm1(grown + unit * (abs(shifted) + spec.num_experts + 8))
        else:
            self.scores = 1 / (1 + np.exp(-logits))
            self.relative = np.expm1(slack + 8 * unit)
        score_slack = self.scores * self.relative + 1e-37
        biased = problem.selection_bias is not None
        self.value = self.scores + selection_bias if biased else logits
        self.slack = score_slack + unit * abs(self.value) if biased else slack
        # What is equal by construction must tie exactly: same row and biases, or (exactly known) same logit and bias.
        keys = np.hstack([w, logit_bias[:, None], selection_bias[:, None]])
        by_row = np.broadcast_to(np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1), logits.shape)
        self.kind = [
            np.unique(np.stack([logits[t], selection_bias], 1), axis=0, return_inverse=True)[1].reshape(-1)
            if problem.exact
            else by_row[t]
            for t in range(len(x))
        ]
        shape = (len(x), spec.num_groups, spec.num_experts // spec.num_groups)
        if spec.group_score == "top2_sum" and spec.num_groups > 1:
            base, base_slack = (self.value, self.slack) if biased else (self.scores, score_slack)
            self.group_value = np.sort(base.reshape(shape), axis=2)[:, :, -2:].sum(axis=2)
            self.group_slack = 2 * base_slack.reshape(shape).max(axis=2) + unit * abs(self.group_value)
        else:
            self.group_value = self.value.reshape(shape).max(axis=2)
            self.group_slack = self.slack.reshape(shape).max(axis=2)

    def accepts_ids(self, token: int, ids: np.ndarray) -> bool:
        ids = [int(i) for i in ids]
        if len(set(ids)) != self.spec.top_k or not all(0 <= i < self.spec.num_experts for i in ids):
            return False
        share = self.spec.num_experts // self.spec.num_groups
        needed = {i // share for i in ids}
        return any(
            needed <= groups and self._in_order(token, ids, [e for g in sorted(groups) for e in range(g * share, (g + 1) * share)])
            for groups in self._group_sets(token)
        )

    def accepts_weights(self, token: int, ids: np.ndarray, weights: np.ndarray) -> bool:
        scores, relative = self.scores[token, ids], self.relative[token, ids]
        if self.spec.renormalize:
            scores, relative = scores / (scores.sum() + 1e-20), relative + relative.max()
        want = scores * self.spec.routed_scale
        bound = want * (relative + 4 * 2.0**-24) + 1e-37
        return bool((abs(weights.astype(np.float64) - want) <= bound).all())

    def _in_order(self, token: int, ids: list[int], candidates: list[int]) -> bool:
        value, slack, kind = self.value[token], self.slack[token], self.kind[token]
        left = np.zeros(self.spec.num_experts, bool)
        left[candidates] = True
        for i in ids:
            if not left[i] or (left[:i] & (kind[:i] == kind[i])).any():
                return False
            left[i] = False
            if (left & (value - slack > value[i] + slack[i])).any():
                return False
        return True

    def _group_sets(self, token: int) -> Any:
        """The sets of groups that rounding errors may lead to."""
        spec, value, slack = self.spec, self.group_value[token], self.group_slack[token]
        low, high = value - slack, value + slack
        count = spec.top_groups
        if count == spec.num_groups:
            yield set(range(count))
            return
        kinds = [tuple(sorted(kinds)) for kinds in self.kind[token].reshape(spec.num_groups, -1)]
        every = range(spec.num_groups)
        sure = {g for g in every if sum(high[h] >= low[g] for h in every if h != g) < count}
        lost = {g for g in every if sum(low[h] > high[g] for h in every if h != g) >= count}
        for chosen in itertools.combinations(sorted(set(every) - sure - lost), count - len(sure)):
            groups = sure | set(chosen)
            if all(h in groups for g in chosen for h in range(g) if kinds[h] == kinds[g]):
                yield groups


def check(spec: fmg.MoESpec, problem: Problem, ids: np.ndarray, weights: np.ndarray) -> None:
    want_ids, want_weights = problem.reference(spec)
    judge = Judge(spec, problem)
    for token in range(len(ids)):
        if (ids[token] != want_ids[token]).any():
            assert judge.accepts_ids(token, ids[token]), (token, ids[token], want_ids[token])
        else:
            np.testing.assert_allclose(weights[token], want_weights[token], rtol=2e-4, atol=1e-6)
        assert judge.accepts_weights(token, ids[token], weights[token]), (token, weights[token], want_weights[token])


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
    problem.w -= np.float32(150 / 64)  # and where they underflow
    assert run(spec, problem)[0].tolist() == [[1, 3]]


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
        replaced = [[*ids[token][:5], e] for e in outside]
        refused += [not judge.accepts_ids(token, swapped), *(not judge.accepts_ids(token, np.array(r)) for r in replaced)]
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
