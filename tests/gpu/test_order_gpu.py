"""What may run at the same time, what is put in order, and what is refused, on one GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ranks import Case, Problem, Ranks, assert_close, build, device_experts, inputs_of, make

import flashmoe_gen as fmg
from flashmoe_gen.args import CONTROL

pytestmark = pytest.mark.gpu
WAY, BOUND = "bfloat16/mma", 5e-3


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build([(spec, {"tile": tile}) for spec, tile in [make(WAY)]])


def on_device(case: Case) -> Any:
    import cupy

    return tuple(map(cupy.asarray, case))


def test_layers_on_two_streams_follow_each_other() -> None:
    """They share heap and scratch, so one after the other, whatever the streams are."""
    import cupy

    spec, tile = make(WAY)
    problem = Problem(spec)
    with fmg.comm.init("single") as comm:
        layers = [fmg.MoELayer(spec, target="cuda", tile=tile, comm=comm) for _ in range(2)]
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in layers]
        experts = device_experts(problem, tuple(range(spec.num_experts)))
        cases = [inputs_of(problem, spec, (300 - 20 * n,), "uniform", n)[0] for n in range(8)]
        arrays = [on_device(case) for case in cases]
        outs = [cupy.full(x.shape, np.nan, x.dtype) for x, _, _ in arrays]
        cupy.cuda.runtime.deviceSynchronize()
        for n in range(64):
            layers[n % 2](*arrays[n % 8], experts, out=outs[n % 8], stream=streams[n % 2])
        for layer in layers:
            layer.check()
        for case, out in zip(cases, outs):
            assert_close(problem, case, cupy.asnumpy(out), BOUND)


@pytest.mark.parametrize("world_size", [1, 2])
def test_graphs_of_one_rank_replayed_at_once_raise(world_size: int) -> None:
    import cupy

    spec, tile = make(WAY, world_size=world_size)
    problem, ranks = Problem(spec), Ranks(spec, tile, max_blocks=32, comms=fmg.comm.local_group(world_size))
    inputs = inputs_of(problem, spec, (300,) * world_size, "uniform")
    ranks.run(problem, inputs)
    experts = [device_experts(problem, ranks.placement.local_experts(rank)) for rank in range(world_size)]
    arrays, graphs = [on_device(case) for case in inputs], []
    outs = [cupy.empty_like(x) for x, _, _ in arrays]
    for rank, layer in enumerate(ranks.layers):
        for _ in range(2):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                for _ in range(10):
                    layer(*arrays[rank], experts[rank], out=outs[rank])
                graphs.append((stream.end_capture(), stream))
    for graph, stream in graphs:
        graph.launch(stream)
    cupy.cuda.runtime.deviceSynchronize()
    with pytest.raises(fmg.CommError, match="at the same time"):
        ranks.comms[0].check()
    resets = [threading.Thread(target=comm.reset) for comm in ranks.comms]
    for thread in resets:
        thread.start()
    for thread in resets:
        thread.join()
    for case, y in zip(inputs, ranks.run(problem, inputs)):
        assert_close(problem, case, y, BOUND)


def test_ranks_that_call_different_layers_are_told_which() -> None:
    import cupy

    spec, tile = make(WAY, world_size=2)
    problem, comms = Problem(spec), fmg.comm.local_group(2)
    pairs = [Ranks(spec, tile, comms=comms) for _ in range(2)]
    inputs = inputs_of(problem, spec, (20, 30), "uniform")
    for ranks in pairs:
        ranks.run(problem, inputs)
    for rank in range(2):
        experts = device_experts(problem, pairs[0].placement.local_experts(rank))
        pairs[rank].layers[rank](*on_device(inputs[rank]), experts, stream=pairs[0].streams[rank])
    cupy.cuda.runtime.deviceSynchronize()
    for comm in comms:
        with pytest.raises(fmg.CommError, match=r"calls its layer [01] where rank [01] calls its layer [01]"):
            comm.check()


def test_halves_of_a_group_find_room_beside_each_other() -> None:
    """One rank of each half first: with half of the GPU each, they would keep the others out until the deadline."""
    import cupy

    spec, tile = make(WAY, world_size=2)
    problem, comms = Problem(spec), fmg.comm.local_group(4)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda comm: comm.split(comm.rank // 2), comms))
    halves = [Ranks(spec, tile, comms=parts[:2]), Ranks(spec, tile, comms=parts[2:])]
    inputs = [inputs_of(problem, spec, (300, 200), "uniform", half) for half in range(2)]
    for ranks, cases in zip(halves, inputs):
        ranks.run(problem, cases)
    experts = [device_experts(problem, halves[0].placement.local_experts(rank)) for rank in range(2)]
    arrays = [[on_device(case) for case in cases] for cases in inputs]
    outs = [[cupy.full(x.shape, np.nan, x.dtype) for x, _, _ in cases] for cases in arrays]
    cupy.cuda.runtime.deviceSynchronize()
    for rank in range(2):
        for half, ranks in enumerate(halves):
            ranks.layers[rank](*arrays[half][rank], experts[rank], out=outs[half][rank], stream=ranks.streams[rank])
    for half, ranks in enumerate(halves):
        for layer, case, out in zip(ranks.layers, inputs[half], outs[half]):
            layer.check()
            assert_close(problem, case, cupy.asnumpy(out), BOUND)


def test_the_epoch_turns() -> None:
    """It goes from 2**32 - 1 to 2: words that were never written are 0."""
    import cupy

    spec, tile = make(WAY, world_size=2)
    problem, ranks = Problem(spec), Ranks(spec, tile)
    for comm in ranks.comms:
        page = CONTROL.zeros()
        page["epoch"] = 2**32 - 3
        memory = comm.heap_memory(comm.rank)
        cupy.cuda.runtime.memcpy(memory.pointer, page.ctypes.data, page.nbytes, cupy.cuda.runtime.memcpyHostToDevice)
    for n in range(6):
        inputs = inputs_of(problem, spec, (50, 60 * n), "uniform", n)
        for case, y in zip(inputs, ranks.run(problem, inputs)):
            assert_close(problem, case, y, BOUND)


@pytest.mark.parametrize("way", ["bfloat16/wgmma", "bfloat16/mma"])
def test_multiprocessors_are_left_to_others(way: str) -> None:
    """As many as were asked for: tests/multigpu looks at whether others can use them."""
    spec, tile = make(way)
    with fmg.MoELayer(spec, target="cuda", tile=tile) as every, fmg.MoELayer(
        spec, target="cuda", tile=tile, reserve_multiprocessors=20
    ) as fewer:
        everywhere = every._target.multiprocessors
        blocks = min(every._fused.kernel.max_workers, everywhere) * (everywhere - 20) // everywhere
        assert fewer._fused.workers == blocks // tile.cluster * tile.cluster < every._fused.workers
    with pytest.raises(fmg.SpecError, match="reserve_multiprocessors"):
        fmg.MoELayer(spec, target="cuda", tile=tile, reserve_multiprocessors=-1)
