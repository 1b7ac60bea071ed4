"""A call is one kernel on the caller's stream and nothing else: no allocation, no synchronisation, all blocks resident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import BF16, BOUNDS, KINDS, Problem, Ranks, assert_close, device_experts, inputs_of, make, random_placement

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu


class OneLayer:
    """A layer of one rank with its inputs and an output on the GPU, and the bits it must give."""

    def __init__(self, way: str, **options: Any) -> None:
        import cupy

        spec, tile = make(way)
        problem = Problem(spec)
        (case,) = inputs_of(problem, spec, [100], "uniform")
        self.want = Ranks(spec, tile).run(problem, [case])[0]
        assert_close(problem, case, self.want, BOUNDS[way])
        self.layer = fmg.MoELayer(spec, target="cuda", tile=tile, **options)
        self.x, self.ids, self.weights = map(cupy.asarray, case)
        self.router_weight = cupy.asarray(problem.tokens(spec.num_experts, 1))
        self.experts = device_experts(problem, tuple(range(spec.num_experts)))
        self.out = cupy.asarray(np.full_like(case[0], np.nan))
        cupy.cuda.runtime.deviceSynchronize()

    def __call__(self, **options: Any) -> Any:
        return self.layer(self.x, self.ids, self.weights, self.experts, **{"out": self.out, **options})

    def assert_right(self) -> None:
        import cupy

        self.layer.check()
        assert cupy.asnumpy(self.out).tobytes() == self.want.tobytes()


def captured(stream: Any, work: Callable[[], Any]) -> Any:
    """The graph of what ``work`` queues on a stream; whatever would synchronise or allocate is an error meanwhile."""
    import cupy

    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph


def node_types(graph: Any) -> list[str]:
    from cuda.bindings import driver

    status, _, count = driver.cuGraphGetNodes(graph.graph)
    assert status == driver.CUresult.CUDA_SUCCESS
    status, nodes, _ = driver.cuGraphGetNodes(graph.graph, count)
    assert status == driver.CUresult.CUDA_SUCCESS
    names = {int(kind): kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower() for kind in driver.CUgraphNodeType}
    return [names[int(driver.cuGraphNodeGetType(node)[1])] for node in nodes]


@pytest.mark.parametrize("way", BF16)
def test_a_call_is_one_kernel(way: str) -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    one = OneLayer(way)
    for queue in (lambda: one(stream=stream), one):  # on the stream named, or on the current one
        with stream:
            queue()
        stream.synchronize()
        graph = captured(stream, queue)
        assert node_types(graph) == ["kernel"]
        one.out.fill(np.nan)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        one.assert_right()

    def with_a_memset() -> None:
        one(stream=stream)
        cupy.cuda.runtime.memsetAsync(one.out.data.ptr, 0, one.out.nbytes, stream.ptr)

    assert sorted(node_types(captured(stream, with_a_memset))) == ["kernel", "memset"]


def test_a_layer_made_for_a_stream_uses_it() -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    one = OneLayer(BF16[0], stream=stream)
    one()
    one.layer.route(one.x, one.router_weight)
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)  # route() takes its outputs from CuPy's pool
    try:
        one()
        one.layer.route(one.x, one.router_weight)
    finally:
        graph = stream.end_capture()
    assert node_types(graph) == ["kernel", "kernel"]


def test_routing_is_one_kernel() -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    one = OneLayer(BF16[0])
    with stream:
        ids, weights = map(cupy.asnumpy, one.layer.route(one.x, one.router_weight))  # leaves room in CuPy's pool
    stream.synchronize()
    outputs: list[Any] = []
    graph = captured(stream, lambda: outputs.extend(one.layer.route(one.x, one.router_weight)))
    assert node_types(graph) == ["kernel"]
    for output in outputs:
        output.fill(0)
    cupy.cuda.runtime.deviceSynchronize()
    graph.launch(stream)
    stream.synchronize()
    assert [cupy.asnumpy(output).tobytes() for output in outputs] == [ids.tobytes(), weights.tobytes()]
    want = fmg.reference.route(one.layer.spec, cupy.asnumpy(one.x), cupy.asnumpy(one.router_weight))[0]
    assert (ids == want).all(1).mean() > 0.95


@pytest.mark.parametrize("way", BF16)
def test_a_call_with_out_allocates_nothing(way: str) -> None:
    import cupy

    class Counter(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "Counter"
        count = 0

        def malloc_preprocess(self, **_: Any) -> None:
            self.count += 1

        def alloc_preprocess(self, **_: Any) -> None:
            self.count += 1

    one = OneLayer(way)
    with Counter() as counter:
        for count in (None, 17, 0):
            one(num_tokens=count)
    assert counter.count == 0
    with Counter() as counter:
        one(out=None)
    assert counter.count > 0
    one()
    one.assert_right()


@pytest.mark.parametrize("way", BF16)
def test_graph_replay_with_changing_num_tokens(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    (layer,), (stream,) = ranks.layers, ranks.streams
    experts = device_experts(problem, ranks.placement.local_experts(0))
    x, ids, weights = (cupy.asarray(a) for a in inputs_of(problem, spec, [300], "uniform")[0])
    out, count = cupy.empty_like(x), cupy.zeros(1, cupy.int32)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        stream.begin_capture()
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        graph = stream.end_capture()
    for n in (300, 0, 1, 77, 300, 5):
        case = inputs_of(problem, spec, [300], "uniform", seed=n)
        for to, new in zip((x, ids, weights), case[0]):
            to.set(new)
        count.fill(n)
        out.fill(np.nan)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        y = cupy.asnumpy(out)
        x_n, ids_n, weights_n = (a[:n] for a in case[0])
        assert np.isnan(y[n:].astype(np.float32)).all()
        eager = ranks.run(problem, [(x_n, ids_n, weights_n)])[0]
        assert y[:n].tobytes() == eager.tobytes()
    layer.check()


@pytest.mark.parametrize("way", BF16)
def test_ten_thousand_calls_with_changing_counts(way: str) -> None:
    import cupy

    spec, tile = make(way, shape=(128, 128, 8, 2), max_tokens=128)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    (layer,), (stream,) = ranks.layers, ranks.streams
    x, ids, weights = (cupy.asarray(a) for a in inputs_of(problem, spec, [128], "uniform")[0])
    want = ranks.run(problem, inputs_of(problem, spec, [128], "uniform"))[0]
    experts = device_experts(problem, ranks.placement.local_experts(0))
    counts = np.random.default_rng(0).integers(0, 129, 10_000)
    out = cupy.empty_like(x)
    with stream:
        for n in counts:
            layer(x, ids, weights, experts, out=out, num_tokens=int(n))
        stream.synchronize()
        out.fill(np.nan)
        layer(x, ids, weights, experts, out=out)
        stream.synchronize()
    layer.check()
    assert cupy.asnumpy(out).tobytes() == want.tobytes()
    assert layer.stats().calls == 10_002


class Protocol:
    """A stream of a library nobody knows: all it has is the CUDA stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def stream_of(kind: str) -> tuple[Any, int, Any]:
    """What to pass as stream=, its handle, and what keeps it alive. None of them waits for the default stream."""
    import cupy

    if kind == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        made = torch.cuda.Stream()
        return made, made.cuda_stream, made
    if kind == "cuda.core":
        core = pytest.importorskip("cuda.core", reason="cuda.core is not installed")
        device = core.Device()
        device.set_current()
        made = device.create_stream()
        return made, int(made.__cuda_stream__()[1]), made
    made = cupy.cuda.Stream(non_blocking=True)
    return {"cupy": made, "handle": made.ptr, "protocol": Protocol(made.ptr)}[kind], made.ptr, made


@pytest.mark.parametrize("kind", ["cupy", "handle", "protocol", "torch", "cuda.core"])
def test_a_call_stands_between_what_its_stream_did_before_and_does_after(kind: str) -> None:
    import cupy

    runtime = cupy.cuda.runtime
    given, handle, _alive = stream_of(kind)
    one = OneLayer(BF16[0])
    fresh, result = cupy.asarray(cupy.asnumpy(one.x)), cupy.zeros_like(one.out)
    one.x.fill(np.nan)
    long = cupy.empty(1 << 28, cupy.uint8)
    runtime.deviceSynchronize()
    for _ in range(100):
        runtime.memsetAsync(long.data.ptr, 0, long.nbytes, handle)
    runtime.memcpyAsync(one.x.data.ptr, fresh.data.ptr, fresh.nbytes, runtime.memcpyDeviceToDevice, handle)
    assert runtime.streamQuery(handle) != 0  # the tokens are not there yet
    one(stream=given)
    runtime.memcpyAsync(result.data.ptr, one.out.data.ptr, result.nbytes, runtime.memcpyDeviceToDevice, handle)
    runtime.streamSynchronize(handle)
    assert cupy.asnumpy(result).tobytes() == one.want.tobytes()
    one.assert_right()


def test_what_is_no_stream_is_refused() -> None:
    one = OneLayer(BF16[0])
    with pytest.raises(fmg.SpecError, match=r"stream is a str\. Must be a CUDA stream"):
        one(stream="x")
    with pytest.raises(fmg.SpecError, match=r"stream is a str\. Must be a CUDA stream"):
        fmg.MoELayer(one.layer.spec, target="cuda", stream="x")
    one()
    one.assert_right()


@pytest.mark.parametrize("more", [0, 1, 18])
@pytest.mark.parametrize("way", BF16)
def test_few_blocks_give_the_same_bits(way: str, more: int) -> None:
    spec, tile = make(way)
    problem = Problem(spec)
    blocks = 2 * tile.cluster + more
    all_blocks, few = Ranks(spec, tile), Ranks(spec, tile, max_blocks=blocks)
    assert few.layers[0]._fused.workers == blocks // tile.cluster * tile.cluster < all_blocks.layers[0]._fused.workers
    for n, count in enumerate((0, 1, 77, 300)):
        case = inputs_of(problem, spec, [count], KINDS[n])
        assert few.run(problem, case)[0].tobytes() == all_blocks.run(problem, case)[0].tobytes()


@pytest.mark.parametrize("way", BF16)
def test_more_blocks_than_are_resident_are_refused(way: str) -> None:
    spec, tile = make(way, world_size=8)
    comms = fmg.comm.local_group(8)
    most = fmg.MoELayer(spec, target="cuda", tile=tile, comm=comms[0])._fused.workers
    single = fmg.MoELayer(spec.replace(world_size=1), target="cuda", tile=tile)
    assert single._fused.workers // 8 == most >= 2
    for blocks, fields in ((most + 1, {"spec": spec, "comm": comms[1]}), (single._fused.workers + 1, {"spec": single.spec})):
        match = f"max_blocks={blocks} is not valid.* at most {blocks - 1} resident blocks"
        with pytest.raises(fmg.SpecError, match=match):
            fmg.MoELayer(**fields, target="cuda", tile=tile, max_blocks=blocks)
    with pytest.raises(fmg.SpecError, match=r"max_blocks=1 is not valid\. Must be at least 2"):
        fmg.MoELayer(single.spec, target="cuda", tile=tile, max_blocks=1)
    if tile.cluster > 1:
        with pytest.raises(fmg.SpecError, match=r"max_blocks=3 is not valid.* and need 4"):
            fmg.MoELayer(single.spec, target="cuda", tile=tile, max_blocks=3)


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BF16)
def test_eight_ranks_on_one_gpu(way: str, combine: str) -> None:
    spec, tile = make(way, shape=(144, 208, 11, 3), world_size=8, max_tokens=70)
    problem = Problem(spec)
    ranks = Ranks(spec, tile, random_placement(np.random.default_rng(1), 11, 8), schedule=fmg.Schedule(combine=combine))
    for n, counts in enumerate([[70, 0, 1, 33, 5, 0, 16, 17], [0] * 7 + [70], [1] * 8, [0] * 8, [70] * 8]):
        case = inputs_of(problem, spec, counts, KINDS[n], seed=n)
        for y, part in zip(ranks.run(problem, case), case):
            assert_close(problem, part, y, BOUNDS[way])
