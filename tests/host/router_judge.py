"""Helpers of the router tests: random problems, one launch of the kernel, and the judge of its choice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import flashmoe_gen as fmg
from flashmoe_gen.args import ROUTER_ARGS
from flashmoe_gen.launch.host import HostKernel, HostTarget
from flashmoe_gen.launch.target import Prepared


def make_spec(num_experts: int = 64, dtype: str = "float32", **fields: Any) -> fmg.MoESpec:
    fields = {"hidden_size": 64, "intermediate_size": 64, "top_k": 2, "max_tokens": 64, **fields}
    return fmg.MoESpec(num_experts=num_experts, dtype=dtype, **fields)


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
    HostTarget().launch(kernel, Prepared(args), threads, None)
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
        cls,
        spec: fmg.MoESpec,
        tokens: int,
        seed: int,
        *,
        grid: bool = False,
        twins: bool = False,
        logit_bias: bool = False,
        selection_bias: bool = False,
    ) -> Problem:
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
        biases = {"logit_bias": self.logit_bias, "selection_bias": self.selection_bias}
        return fmg.reference.route(spec, self.x, self.w, **biases)


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
        group_of = np.arange(self.spec.num_experts) // (self.spec.num_experts // self.spec.num_groups)
        needed = set(group_of[ids])
        return any(
            needed <= groups and self._in_order(token, ids, np.isin(group_of, list(groups)))
            for groups in self._group_sets(token)
        )

    def accepts_weights(self, token: int, ids: np.ndarray, weights: np.ndarray) -> bool:
        scores, relative = self.scores[token, ids], self.relative[token, ids]
        if self.spec.renormalize:
            scores, relative = scores / (scores.sum() + 1e-20), relative + relative.max()
        want = scores * self.spec.routed_scale
        bound = want * (relative + 4 * 2.0**-24) + 1e-37
        return bool((abs(weights.astype(np.float64) - want) <= bound).all())

    def _in_order(self, token: int, ids: list[int], left: np.ndarray) -> bool:
        value, slack, kind = self.value[token], self.slack[token], self.kind[token]
        for i in ids:
            if not left[i] or (left[:i] & (kind[:i] == kind[i])).any():
                return False
            left[i] = False
            if (left & (value - slack > value[i] + slack[i])).any():
                return False
        return True

    def _group_sets(self, token: int) -> Iterator[set[int]]:
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
