"""Helpers of the host tests: random problems, several ranks, poisoned buffers, the reference beside them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import flashmoe_gen as fmg
from flashmoe_gen.dtypes import get_dtype

# Relative L2 error allowed against the float64 reference.
BOUNDS = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5, "float64": 1e-12}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    difference = np.linalg.norm(np.asarray(got, np.float64) - want)
    size = np.linalg.norm(want)
    return float(difference / size) if size else float(difference)


@dataclass
class Problem:
    """Random weights of a layer, for all experts in global order."""

    spec: fmg.MoESpec
    seed: int = 0
    weights: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        spec, rng = self.spec, np.random.default_rng(self.seed)
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        shapes = {"up": (e, i, h), "down": (e, h, i)}
        if spec.mlp == "gated":
            shapes["gate"] = (e, i, h)
        if spec.bias:
            shapes |= {f"{name}_bias": shape[:2] for name, shape in list(shapes.items())}
        dtype = get_dtype(spec.dtype).numpy
        self.weights = {
            name: (rng.standard_normal(shape) / (np.sqrt(shape[-1]) if len(shape) == 3 else 4)).astype(dtype)
            for name, shape in shapes.items()
        }

    def tokens(self, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, seed))
        return rng.standard_normal((count, self.spec.hidden_size)).astype(get_dtype(self.spec.dtype).numpy)

    def experts(self, ids: Any) -> fmg.Experts:
        """The weights of one rank's experts, in slot order."""
        return fmg.Experts(**{name: np.ascontiguousarray(w[list(ids)]) for name, w in self.weights.items()})

    def reference(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return fmg.reference.moe(self.spec, x, ids, weights, **self.weights)


def routes(spec: fmg.MoESpec, count: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Routing of ``count`` tokens: "uniform", "skewed", "one", "few", "masked" or "none"."""
    rng = np.random.default_rng((seed, 77))
    e, k = spec.num_experts, spec.top_k
    if kind == "skewed":
        logits = rng.gumbel(size=(count, e)) - 1.5 * np.log(1 + np.arange(e))
    elif kind == "few":
        logits = rng.gumbel(size=(count, e)) - 1e3 * (np.arange(e) >= max(k, e // 3))
    else:
        logits = rng.gumbel(size=(count, e))
    ids = np.argsort(-logits, axis=1)[:, :k].astype(np.int32)
    if kind == "one":  # one expert takes a route of every token
        ids[:, 0] = np.where((ids == 0).any(1), ids[:, 0], 0) if k > 1 else 0
    weights = rng.random((count, k)).astype(np.float32) + np.float32(0.1)
    if kind == "masked":
        ids[rng.random((count, k)) < 0.4] = -1
    elif kind == "none":
        ids[:] = -1
    return ids, weights


def poison(layer: fmg.MoELayer, *, heap: bool = True) -> None:
    """Fill everything that may hold anything before a call with NaN patterns (all bits set: NaN in every dtype)."""
    placed = layer._placed
    for region in placed.scratch_regions.values():
        if not region.persistent:
            placed.scratch.memory.fill(region.offset, region.bytes, 0xFF)
    if heap:
        for region in layer.comm.heap.regions.values():
            if not region.persistent:
                layer.comm.heap_memory(layer.comm.rank).fill(region.offset, region.bytes, 0xFF)


def on_ranks(world_size: int, work: Any) -> list[Any]:
    """Run ``work(rank)`` on a thread per rank; return the results in rank order, or raise the first error."""
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def prebuild(kernels: list[tuple[fmg.MoESpec, str, fmg.TileConfig | None]]) -> None:
    """Compile (spec, kernel, tile) two at a time, so that the tests find them in the cache."""
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda k: fmg.generate(k[0], arch="host", kernel=k[1], tile=k[2]).compile(), kernels):
            pass


class World:
    """A layer on every rank of a local group."""

    def __init__(self, spec: fmg.MoESpec, *, tile: fmg.TileConfig | None = None, schedule: fmg.Schedule | None = None,
                 placement: fmg.Placement | None = None, processors: int | None = None,
                 comms: Any = None) -> None:  # fmt: skip
        self.spec = spec
        self.comms = comms or fmg.comm.local_group(spec.world_size)
        self.placement = placement or fmg.Placement.default(spec.num_experts, spec.world_size)
        self.layers = [
            fmg.MoELayer(spec, target="host", tile=tile, schedule=schedule, comm=comm, placement=self.placement)
            for comm in self.comms
        ]
        if processors is not None:
            for layer in self.layers:
                layer._fused = layer._fused.with_processors(processors)
                layer.set_placement(self.placement)

    def run(self, problem: Problem, inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], **options: Any) -> list[np.ndarray]:
        """One call on every rank, every buffer poisoned before; returns y per rank."""
        for layer in self.layers:
            poison(layer)
        experts = [problem.experts(self.placement.local_experts(rank)) for rank in range(self.spec.world_size)]
        outs = [np.full(x.shape, np.nan, x.dtype) for x, _, _ in inputs]

        def call(rank: int) -> np.ndarray:
            x, ids, weights = inputs[rank]
            return self.layers[rank](x, ids, weights, experts[rank], out=outs[rank], **options)

        return on_ranks(self.spec.world_size, call)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


__all__ = ["BOUNDS", "Problem", "World", "bits", "ml_dtypes", "on_ranks", "poison", "relative_error", "routes"]
