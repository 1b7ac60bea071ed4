"""What the GPU tests share: ways to compute and their bounds, problems on the device, a layer on every rank of one GPU."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
from world import Problem, poison, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.launch.cuda import CudaTarget

# Arithmetic / block program -> relative error allowed.
BOUNDS = {
    "bfloat16/wgmma": 5e-3, "bfloat16/mma": 5e-3, "float16/wgmma": 1e-3, "float16/mma": 1e-3,
    "tf32/mma": 1e-3, "ffma/mma": 1e-5, "float64/mma": 1e-12,
}  # fmt: skip
BF16 = ["bfloat16/wgmma", "bfloat16/mma"]
KINDS = ("uniform", "skewed", "one", "few", "masked", "none")
GPT_OSS: dict[str, Any] = {
    "bias": True,
    "gate_limit": 7.0,
    "up_offset": 1.0,
    "swish_beta": 1.702,
    "swish_alpha": 1 / 1.702,
}

Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, ids, weights of one rank's call


def runs_here(way: str) -> bool:
    return way.endswith("/mma") or CudaTarget().arch == "sm_90a"


def make(
    way: str, *, shape: tuple[int, int, int, int] = (144, 208, 7, 3), **fields: Any
) -> tuple[fmg.MoESpec, fmg.TileConfig]:
    """Spec and default tile of one of ``BOUNDS``; skips the test where this GPU has no such program."""
    math, program = way.split("/")
    dtype = "float32" if math in ("tf32", "ffma") else math
    spec = fmg.MoESpec(*shape, dtype=dtype, **{"max_tokens": 300, **fields})
    if not runs_here(way):
        pytest.skip(f"{program} is not on {CudaTarget().arch}")
    tile = fmg.default_tile(spec, CudaTarget().arch, program)  # type: ignore[arg-type]
    return spec, tile.replace(math=math) if dtype == "float32" else tile


def build(sources: Iterable[tuple[fmg.MoESpec, dict[str, Any]]]) -> None:
    """Compile what ``fmg.generate(spec, **options)`` makes, all at once, so that the tests find it in the cache.

    What does not compile is left to its test.
    """
    arch = CudaTarget().arch
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for spec, options in sources:
            pool.submit(lambda spec, options: fmg.generate(spec, arch=arch, **options).compile(), spec, options)


@functools.lru_cache(maxsize=16)
def device_experts(problem: Problem, ids: tuple[int, ...]) -> fmg.Experts:
    """The weights of some experts on the GPU, in this order."""
    import cupy

    return fmg.Experts(**{name: cupy.asarray(w[list(ids)]) for name, w in problem.weights.items()})


Problem.__hash__ = object.__hash__  # type: ignore[method-assign]


def inputs_of(problem: Problem, spec: fmg.MoESpec, counts: Sequence[int], kind: str, seed: int = 0) -> list[Case]:
    """Tokens and routes of one call, for each rank as many tokens as ``counts`` says."""
    return [(problem.tokens(n, seed + r), *routes(spec, n, kind, seed + r)) for r, n in enumerate(counts)]


def random_placement(rng: np.random.Generator, num_experts: int, world_size: int) -> fmg.Placement:
    """Experts in any order on any rank; a rank may hold none."""
    order, owner = rng.permutation(num_experts), rng.integers(0, world_size, num_experts)
    return fmg.Placement([[int(e) for e in order if owner[e] == rank] for rank in range(world_size)])


def assert_close(problem: Problem, case: Case, y: np.ndarray, bound: float) -> None:
    error = relative_error(y, problem.reference(*case))
    assert error <= bound, f"{len(y)} tokens: relative error {error}"


class Ranks:
    """A layer on every rank, all on this GPU, each on a stream of its own."""

    def __init__(
        self,
        spec: fmg.MoESpec,
        tile: fmg.TileConfig,
        placement: fmg.Placement | None = None,
        *,
        schedule: fmg.Schedule | None = None,
        comms: list[fmg.comm.Communicator] | None = None,
        instruments: Sequence[fmg.Instrument | None] | None = None,
        max_blocks: int | None = None,
    ) -> None:
        import cupy

        self.spec = spec
        self.comms = comms or fmg.comm.local_group(spec.world_size)
        self.placement = placement or fmg.Placement.default(spec.num_experts, spec.world_size)
        self.streams = [cupy.cuda.Stream(non_blocking=True) for _ in self.comms]
        self.layers = [
            fmg.MoELayer(
                spec,
                target="cuda",
                tile=tile,
                schedule=schedule,
                comm=comm,
                placement=self.placement,
                max_blocks=max_blocks,
                instrument=instrument,
            )
            for comm, instrument in zip(self.comms, instruments or [None] * spec.world_size)
        ]

    def run(self, problem: Problem, inputs: list[Case], *, clean: bool = True, **options: Any) -> list[np.ndarray]:
        """One call on every rank; returns y per rank, NaN where nothing was written."""
        return self.run_all(problem, [inputs], clean=clean, **options)[0]

    def run_all(
        self, problem: Problem, calls: list[list[Case]], *, clean: bool = True, **options: Any
    ) -> list[list[np.ndarray]]:
        """Several calls on every rank, all queued before any result is looked at: a rank may run ahead of the others."""
        import cupy

        if clean:
            for layer in self.layers:
                poison(layer)
        arrays = [[tuple(map(cupy.asarray, case)) for case in inputs] for inputs in calls]
        outs = [[cupy.full(x.shape, np.nan, x.dtype) for x, _, _ in inputs] for inputs in arrays]
        experts = [device_experts(problem, self.placement.local_experts(rank)) for rank in range(self.spec.world_size)]
        cupy.cuda.runtime.deviceSynchronize()
        for inputs, out in zip(arrays, outs):
            for rank, layer in enumerate(self.layers):
                layer(*inputs[rank], experts[rank], out=out[rank], stream=self.streams[rank], **options)
        cupy.cuda.runtime.deviceSynchronize()
        for layer in self.layers:
            layer.check()
        return [[cupy.asnumpy(y) for y in out] for out in outs]

    def set_placement(self, placement: fmg.Placement) -> None:
        self.placement = placement
        for layer in self.layers:
            layer.set_placement(placement)


__all__ = [
    "BF16",
    "BOUNDS",
    "GPT_OSS",
    "KINDS",
    "Case",
    "Problem",
    "Ranks",
    "assert_close",
    "build",
    "device_experts",
    "inputs_of",
    "make",
    "random_placement",
    "relative_error",
    "routes",
    "runs_here",
]


@contextmanager
def held_back(stream: Any) -> Iterator[None]:
    """Nothing that the stream is given inside starts before the end."""
    gate = threading.Event()
    stream.launch_host_func(lambda gate: gate.wait(60), gate)
    try:
        yield
        assert not stream.done
    finally:
        gate.set()
