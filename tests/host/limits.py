"""Helpers of the tests of tails and ranges, on the host and on a GPU: exact activations, and layers at float16's ends."""

from __future__ import annotations

import functools
import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
from world import Problem, routes

import flashmoe_gen as fmg

WINDOWS = np.arange(-9.0, 6.0, 0.5)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
WIDTH = 16
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")

Layer = tuple[fmg.MoESpec, dict[str, np.ndarray]]


def _erf(z: Decimal) -> Decimal:
    """The Taylor series, whose terms reach exp(z^2)."""
    term, total, n = z, z, 0
    while abs(term) > Decimal(10) ** -130:
        n += 1
        term = -term * z * z / n
        total += term / (2 * n + 1)
    return 2 / _PI.sqrt() * total


@functools.cache
def exact(name: str, value: float) -> float:
    """The activation in 140 digits, which no cancellation uses up where ``value`` is over -13."""
    with localcontext() as context:
        context.prec = 140
        z = Decimal(value)
        if name == "gelu":
            return float(z / 2 * (1 + _erf(z / Decimal(2).sqrt())))
        s = z if name == "silu" else 2 * (2 / _PI).sqrt() * (z + Decimal("0.044715") * z**3)
        return float(z / (1 + (-s).exp()))


def exact_all(name: str, z: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: exact(name, float(value)), otypes=[np.float64])(z)


def window_inputs(spec: fmg.MoESpec) -> np.ndarray:
    """Four tokens in each window, window by window: numbers that every dtype but float16 and TF32 too hold exactly."""
    z = WINDOWS[:, None, None] + 0.5 * np.random.default_rng(0).random((len(WINDOWS), 4, WIDTH))
    return z.astype(np.float16).astype(spec.element.numpy).reshape(-1, WIDTH)


def identity_layer(spec: fmg.MoESpec) -> dict[str, np.ndarray]:
    """Weights with which ``y = act(x)``."""
    eye = np.eye(WIDTH).astype(spec.element.numpy)[None]
    return {"up": eye, "down": eye}


def tolerance(dtype: str, bound: float, want: np.ndarray) -> float:
    """Of the relative error; float16 has a smallest step, twice that in the intermediate, whatever is computed."""
    return bound + (3 * 2.0**-25 / float(np.sqrt(np.mean(want**2))) if dtype == "float16" else 0.0)


def ends(spec: fmg.MoESpec) -> tuple[np.ndarray, dict[str, np.ndarray], list[float]]:
    """Numbers at the ends of the dtype, one for each expert, as the one input of its activation that is not 0.

    Returns:
        The numbers as the dtype has them, weights, and what comes of them in column 0: -inf gives -inf * 0, as in torch.
    """
    largest = {"float16": 6e4, "float64": 1e300}.get(spec.dtype, 1e38)
    values = np.array([0.0, -0.0, 100.0, -1e4, 1e4, -largest, largest, math.inf, -math.inf, math.nan])
    kind, count = spec.element.numpy, spec.num_experts
    weights = {"up": np.zeros((count, WIDTH, WIDTH), kind), "down": np.stack([np.eye(WIDTH).astype(kind)] * count)}
    weights |= {"up_bias": np.zeros((count, WIDTH), kind), "down_bias": np.zeros((count, WIDTH), kind)}
    weights["up_bias"][:, 0] = values
    rounded = values.astype(kind)
    want = [math.nan if math.isnan(z) or z == -math.inf else max(z, 0.0) for z in rounded.astype(np.float64)]
    return rounded, weights, want


ENDS = 10  # experts of ends()


class LargeRows(Problem):
    """float16: rows of experts up to 3e5, which a weight of at most 0.1 brings back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights["down"] = (self.weights["down"].astype(np.float32) * 6e4).astype(np.float16)

    def case(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights of both signs and 0, and masked routes."""
        ids, weights = routes(self.spec, count, "masked", seed)
        rng = np.random.default_rng(seed)
        weights = rng.uniform(-0.1, 0.1, weights.shape).astype(np.float32)
        weights[rng.random(weights.shape) < 0.1] = 0
        return self.tokens(count, seed + 1), ids, weights


class LargeIntermediates(Problem):
    """float16: elements of the intermediate up to 1.2e5, which the second matrix brings back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights["up"] = (self.weights["up"].astype(np.float32) * 2e4).astype(np.float16)
        self.weights["down"] = (self.weights["down"].astype(np.float32) * 0.05).astype(np.float16)

    def case(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens(count, seed + 1), *routes(self.spec, count, "uniform", seed)


def peaks(problem: Any, case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[float, float]:
    """The largest element of a live route's row, and of its intermediate, in a vanilla layer of activation "identity"."""
    x, ids, weights = case
    row = middle = 0.0
    for token, route in np.argwhere((ids >= 0) & (weights != 0)):
        expert = ids[token, route]
        inner = problem.weights["up"][expert].astype(np.float64) @ x[token].astype(np.float64)
        middle = max(middle, abs(inner).max())
        row = max(row, abs(problem.weights["down"][expert].astype(np.float64) @ inner).max())
    return float(row), float(middle)
