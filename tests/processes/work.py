"""What ranks of the tests do: a small layer, its inputs, and calls of it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from group import HERE  # noqa: F401  # it puts tests/host on the path
from world import Problem, bits, routes

import flashmoe_gen as fmg

SPEC = fmg.MoESpec(64, 48, 8, 2, dtype="float32", max_tokens=64)
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def inputs_of(spec: fmg.MoESpec, rank: int, count: int = 64) -> Inputs:
    return (Problem(spec).tokens(count, rank), *routes(spec, count, "skewed", rank))


def layer_of(comm: fmg.comm.Communicator, **options: Any) -> fmg.MoELayer:
    return fmg.MoELayer(SPEC.replace(world_size=comm.world_size), comm=comm, **options)


def call(layer: fmg.MoELayer, inputs: Inputs | None = None, count: int = 64) -> str:
    """One call; the digest of what comes back."""
    rank = layer.comm.rank
    experts = Problem(layer.spec).experts(layer.placement.local_experts(rank))
    return digest(layer(*(inputs or inputs_of(layer.spec, rank, count)), experts))


def bad_call(layer: fmg.MoELayer) -> str:
    x, *rest = inputs_of(layer.spec, layer.comm.rank)
    return call(layer, (x[:, :-1], *rest))


def digest(y: np.ndarray) -> str:
    return hashlib.sha256(bits(y)).hexdigest()
