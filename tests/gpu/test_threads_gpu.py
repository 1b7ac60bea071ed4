"""Layers on a GPU used from several threads and streams, and ranks that fail while their peers' kernels wait for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import BF16, BOUNDS, Problem, Ranks, assert_close, device_experts, inputs_of, make

import flashmoe_gen as fmg

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
from test_threads import together

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", BF16)
def test_one_layer_from_threads_with_streams_of_their_own(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    experts = device_experts(problem, tuple(range(spec.num_experts)))
    layer = fmg.MoELayer(spec, target="cuda", tile=tile)
    router_weight = cupy.asarray(problem.tokens(spec.num_experts, 1))
    cases = [tuple(map(cupy.asarray, inputs_of(problem, spec, [200], "uniform", seed=n)[0])) for n in range(3)]
    want = [cupy.asnumpy(layer(*case, experts)) for case in cases]
    routed = [list(map(cupy.asnumpy, layer.route(case[0], router_weight))) for case in cases]
    layer.check()

    def many(n: int) -> None:
        stream = cupy.cuda.Stream(non_blocking=True)
        outs = [cupy.full_like(cases[n][0], np.nan) for _ in range(50)]
        cupy.cuda.runtime.deviceSynchronize()
        with stream:
            routes = []
            for out in outs:
                layer(*cases[n], experts, out=out)
                routes.append(layer.route(cases[n][0], router_weight))
            stream.synchronize()
        for out in outs:
            assert cupy.asnumpy(out).tobytes() == want[n].tobytes()
        for got in routes:
            assert all(cupy.asnumpy(a).tobytes() == b.tobytes() for a, b in zip(got, routed[n]))

    assert together(*(lambda n=n: many(n) for n in range(3))) == [None] * 3
    layer.check()
    assert layer.stats().calls == 153


@pytest.mark.parametrize("what", ["close", "set_placement"])
def test_resources_stay_while_kernels_use_them(what: str) -> None:
    import cupy

    spec, tile = make(BF16[0], shape=(2048, 768, 64, 8), max_tokens=2048)
    problem = Problem(spec)
    experts = device_experts(problem, tuple(range(64)))
    layer = fmg.MoELayer(spec, target="cuda", tile=tile)
    (case,) = inputs_of(problem, spec, [2048], "uniform")
    arrays = tuple(map(cupy.asarray, case))
    want = cupy.asnumpy(layer(*arrays, experts))
    stream = cupy.cuda.Stream(non_blocking=True)
    outs = [cupy.full_like(arrays[0], np.nan) for _ in range(10)]
    cupy.cuda.runtime.deviceSynchronize()
    launched = threading.Event()

    def calls() -> None:
        for out in outs:
            layer(*arrays, experts, out=out, stream=stream)
        launched.set()

    def meanwhile() -> None:
        launched.wait(30)
        layer.close() if what == "close" else layer.set_placement(fmg.Placement([list(range(64))]))
        cupy.zeros(1 << 26, cupy.uint8).fill(255)

    assert together(calls, meanwhile) == [None, None]
    stream.synchronize()
    for out in outs:
        assert cupy.asnumpy(out).tobytes() == want.tobytes()


ENDS: dict[str, tuple[Callable[[Ranks, Any], Any], str]] = {
    "SpecError": (lambda ranks, case: ranks.layers[1](case[0][:, :-8], *case[1:], None), "Rank 1 raised SpecError: x has"),
    "error in route": (lambda ranks, case: ranks.layers[1].route(case[0], case[0][:1]), "Rank 1 raised SpecError: router_weight"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("way", BF16)
def test_a_rank_that_raises_ends_the_kernels_of_its_peers(way: str, name: str) -> None:
    """At the default deadline of a minute; the kernels that wait for rank 1 end at once instead."""
    import cupy

    end, message = ENDS[name]
    spec, tile = make(way, world_size=3)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    cases = inputs_of(problem, spec, [40] * 3, "uniform")
    good = ranks.run(problem, cases)
    arrays = [tuple(map(cupy.asarray, case)) for case in cases]
    outs = [cupy.zeros_like(a[0]) for a in arrays]
    cupy.cuda.runtime.deviceSynchronize()
    for rank in (0, 2):
        held = device_experts(problem, ranks.placement.local_experts(rank))
        ranks.layers[rank](*arrays[rank], held, out=outs[rank], stream=ranks.streams[rank])
    with pytest.raises(fmg.SpecError):
        end(ranks, arrays[1])
    cupy.cuda.runtime.deviceSynchronize()
    for rank in (0, 2):
        assert np.isnan(cupy.asnumpy(outs[rank]).astype(np.float32)).all()
        with pytest.raises(fmg.CommError, match=message):
            ranks.layers[rank].check()
    assert together(*(comm.reset for comm in ranks.comms)) == [None] * 3
    for y, want, case in zip(ranks.run(problem, cases), good, cases):
        assert y.tobytes() == want.tobytes()
        assert_close(problem, case, y, BOUNDS[way])


def test_abort_ends_kernels_that_wait() -> None:
    import cupy

    spec, tile = make(BF16[0], world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [40], "uniform")[0]
    arrays = tuple(map(cupy.asarray, case))
    out = cupy.zeros_like(arrays[0])
    cupy.cuda.runtime.deviceSynchronize()
    held = device_experts(problem, ranks.placement.local_experts(0))
    ranks.layers[0](*arrays, held, out=out, stream=ranks.streams[0])
    ranks.comms[1].close(abort=True)
    cupy.cuda.runtime.deviceSynchronize()
    assert np.isnan(cupy.asnumpy(out).astype(np.float32)).all()
    with pytest.raises(fmg.CommError, match="closed"):
        ranks.layers[0].check()


@pytest.mark.parametrize("way", BF16)
def test_ids_that_are_no_experts_are_left_out_and_reported(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    with fmg.MoELayer(spec, target="cuda", tile=tile) as layer:
        x, ids, weights = inputs_of(problem, spec, [100], "uniform")[0]
        bad = ids.copy()
        bad[7, 0], bad[8, 1], bad[9, 2] = spec.num_experts, 2**31 - 1, -(2**31)
        y = layer(*map(cupy.asarray, (x, bad, weights)), device_experts(problem, tuple(range(spec.num_experts))))
        with pytest.raises(fmg.SpecError, match="topk_ids held 2 ids"):
            layer.check()
        left = ids.copy()
        left[7, 0] = left[8, 1] = left[9, 2] = -1
        assert_close(problem, (x, left, weights), cupy.asnumpy(y), BOUNDS[way])
        layer.check()
