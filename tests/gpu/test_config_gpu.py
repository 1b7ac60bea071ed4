"""What a launch says beside its arguments, whose arguments it takes, and on which GPU it runs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from ranks import BF16, Problem, Ranks, device_experts, held_back, inputs_of, make
from test_launch_gpu import captured

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu


def attributes(graph: Any) -> tuple[int, int]:
    """Whether the only node of a graph, a kernel, is launched cooperatively, and the blocks of its clusters."""
    from cuda.bindings import driver

    status, _, count = driver.cuGraphGetNodes(graph.graph)
    assert status == driver.CUresult.CUDA_SUCCESS and count == 1
    status, (node,), _ = driver.cuGraphGetNodes(graph.graph, count)
    assert status == driver.CUresult.CUDA_SUCCESS
    found = []
    for name in ("COOPERATIVE", "CLUSTER_DIMENSION"):
        attribute = getattr(driver.CUkernelNodeAttrID, f"CU_LAUNCH_ATTRIBUTE_{name}")
        status, value = driver.cuGraphKernelNodeGetAttribute(node, attribute)
        assert status == driver.CUresult.CUDA_SUCCESS
        found.append(value)
    return int(found[0].cooperative), int(found[1].clusterDim.x)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", BF16)
def test_kernels_are_cooperative_unless_ranks_share_the_gpu(way: str, ranks: int) -> None:
    import cupy

    spec, tile = make(way, world_size=ranks)
    problem = Problem(spec)
    made = Ranks(spec, tile)
    layer, stream = made.layers[0], made.streams[0]
    cases = inputs_of(problem, spec, [20] * ranks, "uniform")
    made.run(problem, cases)
    x, ids, weights = map(cupy.asarray, cases[0])
    experts, out = device_experts(problem, made.placement.local_experts(0)), cupy.empty_like(x)
    cupy.cuda.runtime.deviceSynchronize()
    graph = captured(stream, lambda: layer(x, ids, weights, experts, out=out, stream=stream))
    cooperative, cluster = attributes(graph)
    assert cooperative == (ranks == 1)
    assert max(1, cluster) == tile.cluster
    assert layer._fused.workers % tile.cluster == 0


class Two:
    """A layer with two sets of arrays, and the bits that each must give."""

    def __init__(self, way: str) -> None:
        import cupy

        spec, tile = make(way)
        problem = Problem(spec)
        cases = [inputs_of(problem, spec, [count], "uniform", seed=count)[0] for count in (100, 250)]
        ranks = Ranks(spec, tile)
        self.want = [ranks.run(problem, [case])[0] for case in cases]
        assert self.want[0].tobytes() != self.want[1][:100].tobytes()
        self.layer = ranks.layers[0]
        self.experts = device_experts(problem, ranks.placement.local_experts(0))
        self.cases = [tuple(map(cupy.asarray, case)) for case in cases]
        self.outs = [cupy.empty_like(case[0]) for case in self.cases]
        self.clear()

    def clear(self) -> None:
        import cupy

        for out in self.outs:
            out.fill(np.nan)
        cupy.cuda.runtime.deviceSynchronize()

    def __call__(self, number: int, stream: Any) -> None:
        self.layer(*self.cases[number], self.experts, out=self.outs[number], stream=stream)

    def right(self) -> list[bool]:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        self.layer.check()
        return [cupy.asnumpy(out).tobytes() == want.tobytes() for out, want in zip(self.outs, self.want)]


@pytest.mark.parametrize("way", BF16)
def test_a_captured_call_keeps_its_own_arguments(way: str) -> None:
    import cupy

    two, stream = Two(way), cupy.cuda.Stream(non_blocking=True)
    graph = captured(stream, lambda: two(0, stream))
    assert two.right() == [False, False]
    two(1, stream)
    assert two.right() == [False, True]
    two.clear()
    graph.launch(stream)
    assert two.right() == [True, False]
    two(1, stream)
    graph.launch(stream)
    assert two.right() == [True, True]


@pytest.mark.parametrize("way", BF16)
def test_calls_on_two_streams_do_not_see_each_others_arguments(way: str) -> None:
    import cupy

    two, streams = Two(way), [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for first in (0, 1):
        two.clear()
        with held_back(streams[first]):  # neither begins before both are launched
            two(first, streams[first])
            two(1 - first, streams[1 - first])
        assert two.right() == [True, True]


def on_host(array: Any) -> np.ndarray:
    import cupy

    with array.device:
        return np.asarray(cupy.asnumpy(array))


@pytest.mark.multigpu
@pytest.mark.parametrize("way", BF16)
def test_a_layer_stays_on_its_gpu_while_another_is_the_current_one(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    (case,) = inputs_of(problem, spec, [100], "uniform")
    want = Ranks(spec, tile).run(problem, [case])[0]
    router_weight = problem.tokens(spec.num_experts, 1)
    assert cupy.cuda.Device().id == 0
    with cupy.cuda.Device(1):
        layer = fmg.MoELayer(spec, target="cuda", tile=tile)
        arrays = [cupy.asarray(array) for array in case]
        experts = fmg.Experts(**{name: cupy.asarray(weight) for name, weight in problem.weights.items()})
        weight, stream = cupy.asarray(router_weight), cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.deviceSynchronize()
    assert cupy.cuda.Device().id == 0
    for given in (None, stream):
        y = layer(*arrays, experts, stream=given)
        layer.check()
        assert y.device.id == 1 and on_host(y).tobytes() == want.tobytes()
    assert layer.stats().calls == 2 and layer.comm.heap_memory(0).read(0, 8).nbytes == 8
    layer.set_placement(fmg.Placement.default(spec.num_experts, 1))  # tables and workspace anew
    y = layer(*arrays, experts)
    ids, weights = layer.route(arrays[0], weight)
    layer.check()
    assert on_host(y).tobytes() == want.tobytes()
    assert ids.device.id == weights.device.id == 1
    with pytest.raises(fmg.SpecError, match=r"x is on 'cuda:0', but this layer runs on 'cuda:1'"):
        layer(cupy.asarray(case[0]), *arrays[1:], experts)
    other = copy.deepcopy(layer)  # on the GPU of its communicator
    y = other(*arrays, experts)
    other.check()
    assert on_host(y).tobytes() == want.tobytes()
    other.close()
    layer.close()
    assert cupy.cuda.Device().id == 0
