"""Ranks of one process, each on a GPU of its own: kernels store into each other's memory through peer access."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from ranks import BOUNDS, KINDS, Case, assert_close, build, inputs_of, make
from world import Problem, poison

import flashmoe_gen as fmg

pytestmark = pytest.mark.multigpu
DEVICES = [0, 1]


class Ranks:
    """A layer on every rank, each on its own GPU and stream."""

    def __init__(self, spec: fmg.MoESpec, tile: fmg.TileConfig, comms: Any = None, **options: Any) -> None:
        import cupy

        self.spec = spec
        self.comms = comms or fmg.comm.local_group(2, devices=DEVICES)
        self.layers = [fmg.MoELayer(spec, target="cuda", tile=tile, comm=comm, **options) for comm in self.comms]
        self.streams = []
        for device in DEVICES:
            with cupy.cuda.Device(device):
                self.streams.append(cupy.cuda.Stream(non_blocking=True))

    def run(self, problem: Problem, calls: list[list[Case]]) -> list[list[np.ndarray]]:
        """Calls of both ranks, all queued before any result is looked at."""
        import cupy

        for layer in self.layers:
            poison(layer)
        arrays, outs, experts = [], [], []
        for device, layer in zip(DEVICES, self.layers):
            with cupy.cuda.Device(device):
                arrays.append([tuple(map(cupy.asarray, inputs[device])) for inputs in calls])
                outs.append([cupy.full(x.shape, np.nan, x.dtype) for x, _, _ in arrays[-1]])
                mine = list(layer.placement.local_experts(device))
                experts.append(fmg.Experts(**{name: cupy.asarray(w[mine]) for name, w in problem.weights.items()}))
                cupy.cuda.runtime.deviceSynchronize()
        for n in range(len(calls)):
            for rank, layer in enumerate(self.layers):  # the current device is not that of rank 1
                layer(*arrays[rank][n], experts[rank], out=outs[rank][n], stream=self.streams[rank])
        for layer in self.layers:
            layer.check()
        return [[cupy.asnumpy(outs[rank][n]) for rank in DEVICES] for n in range(len(calls))]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    made = [make(way, world_size=2) for way in BOUNDS]
    build((spec, {"tile": tile}) for spec, tile in made)


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BOUNDS)
def test_every_routing(way: str, combine: str) -> None:
    spec, tile = make(way, world_size=2)
    problem, ranks = Problem(spec), Ranks(spec, tile, schedule=fmg.Schedule(combine=combine))  # type: ignore[arg-type]
    calls = [
        inputs_of(problem, spec, ((300, 0), (17, 300), (1, 40))[n % 3], kind, 5 * n) for n, kind in enumerate(KINDS)
    ]
    for inputs, ys in zip(calls, ranks.run(problem, calls)):
        for case, y in zip(inputs, ys):
            assert_close(problem, case, y, BOUNDS[way])


def test_a_rank_without_experts() -> None:
    spec, tile = make("bfloat16/mma", world_size=2)
    everything = fmg.Placement([[], list(range(spec.num_experts))])
    problem, ranks = Problem(spec), Ranks(spec, tile, placement=everything)
    inputs = inputs_of(problem, spec, (100, 30), "uniform")
    for case, y in zip(inputs, ranks.run(problem, [inputs])[0]):
        assert_close(problem, case, y, BOUNDS["bfloat16/mma"])


@pytest.mark.parametrize("way", ["bfloat16/wgmma", "bfloat16/mma", "float64/mma"])
def test_bits_are_those_of_one_gpu(way: str) -> None:
    spec, tile = make(way, world_size=2, batch_invariant=True)
    alone = spec.replace(world_size=1)
    problem, ranks = Problem(spec), Ranks(spec, tile)
    inputs = inputs_of(problem, spec, (211, 64), "uniform")
    ys = ranks.run(problem, [inputs])[0]
    import cupy

    every = fmg.Experts(**{name: cupy.asarray(w) for name, w in problem.weights.items()})
    with fmg.MoELayer(alone, target="cuda", tile=tile) as layer:
        for case, y in zip(inputs, ys):
            assert cupy.asnumpy(layer(*map(cupy.asarray, case), every)).tobytes() == y.tobytes()


def test_200_queued_calls() -> None:
    spec, tile = make("bfloat16/wgmma", world_size=2)
    problem, ranks, rng = Problem(spec), Ranks(spec, tile), np.random.default_rng(1)
    calls = [inputs_of(problem, spec, rng.integers(0, 60, 2), KINDS[n % len(KINDS)], n) for n in range(200)]
    for inputs, ys in zip(calls, ranks.run(problem, calls)):
        for case, y in zip(inputs, ys):
            assert_close(problem, case, y, BOUNDS["bfloat16/wgmma"])


_NEIGHBOURS = r"""
extern "C" __global__ void neighbours(unsigned* here, unsigned* met) {
  extern __shared__ char whole[];  // all of a multiprocessor's, so each block has one of its own
  atomicAdd(here, 1);
  const long long start = clock64();
  while (atomicAdd(here, 0) < gridDim.x && clock64() - start < 400000000) {}
  if (atomicAdd(here, 0) >= gridDim.x) atomicAdd(met, 1);
}
"""


@pytest.mark.parametrize("way", ["bfloat16/wgmma", "bfloat16/mma"])
@pytest.mark.parametrize("reserved", [0, 8])
def test_others_run_on_reserved_multiprocessors(monkeypatch: pytest.MonkeyPatch, way: str, reserved: int) -> None:
    """While a rank waits for its peer, as a collective would that the peer is in; without any, they wait too."""
    import cupy

    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "20")
    spec, tile = make(way, world_size=2)
    problem, ranks = Problem(spec), Ranks(spec, tile, reserve_multiprocessors=reserved)
    inputs = inputs_of(problem, spec, (20, 20), "uniform")
    ranks.run(problem, [inputs])
    blocks, calls = max(1, reserved), []
    with cupy.cuda.Device(0):
        stream, words, done = (
            cupy.cuda.Stream(non_blocking=True),
            cupy.zeros(2, cupy.uint32),
            cupy.cuda.Event(disable_timing=True),
        )
        kernel = cupy.RawKernel(_NEIGHBOURS, "neighbours")
        kernel.max_dynamic_shared_size_bytes = shared = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        launch = functools.partial(kernel, (blocks,), (1,), (words[:1], words[1:]), shared_mem=shared)
        with stream:
            launch()  # loads it
            words.fill(0)
    for device, layer in zip(DEVICES, ranks.layers):  # nothing is allocated while a rank waits: that might wait for it
        with cupy.cuda.Device(device):
            mine = list(layer.placement.local_experts(device))
            experts = fmg.Experts(**{name: cupy.asarray(w[mine]) for name, w in problem.weights.items()})
            arrays = [cupy.asarray(array) for array in inputs[device]]
            out = cupy.empty_like(arrays[0])
            calls.append(functools.partial(layer, *arrays, experts, out=out, stream=ranks.streams[device]))
            cupy.cuda.runtime.deviceSynchronize()
    first = calls[0]()
    time.sleep(0.1)  # until it has its multiprocessors
    with cupy.cuda.Device(0):
        with stream:
            launch()
            done.record(stream)
        time.sleep(1)
        ran = done.done
    second = calls[1]()
    for layer in ranks.layers:
        layer.check()
    assert ran == (reserved > 0)
    for case, y in zip(inputs, (first, second)):
        assert_close(problem, case, cupy.asnumpy(y), BOUNDS[way])
    assert int(words[1]) == blocks, "they met, each on a multiprocessor of its own"


def test_a_missed_deadline_ends_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.5")
    spec, tile = make("bfloat16/mma", world_size=2)
    problem, ranks = Problem(spec), Ranks(spec, tile)
    inputs = inputs_of(problem, spec, (20, 20), "uniform")
    ranks.run(problem, [inputs])
    with cupy.cuda.Device(0):
        mine = list(ranks.layers[0].placement.local_experts(0))
        experts = fmg.Experts(**{name: cupy.asarray(w[mine]) for name, w in problem.weights.items()})
        ranks.layers[0](*map(cupy.asarray, inputs[0]), experts)  # rank 1 does not come
    with pytest.raises(fmg.KernelTimeoutError, match=r"rank 0.*rank 1"):
        ranks.layers[0].check()
    with pytest.raises(fmg.CommError):
        ranks.layers[1].check()
    from threading import Thread

    others = [Thread(target=comm.reset) for comm in ranks.comms]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    for case, y in zip(inputs, ranks.run(problem, [inputs])[0]):
        assert_close(problem, case, y, BOUNDS["bfloat16/mma"])
