"""The trace of a call: every task once, spans that nest, numbers that add up; and that delays do delay."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from world import BOUNDS, Problem, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen import trace
from flashmoe_gen.args import WORKS
from flashmoe_gen.programs import plan_kernel

SPEC = fmg.MoESpec(64, 96, 5, 2, dtype="float32", max_tokens=70)
WORK = {name: number for number, name in enumerate(WORKS)}


def call(layer: fmg.MoELayer, tokens: int) -> np.ndarray:
    problem = Problem(SPEC)
    x = problem.tokens(tokens, 1)
    ids, weights = routes(SPEC, tokens, "uniform", 2)
    y: np.ndarray = layer(x, ids, weights, fmg.Experts(**problem.weights))
    return y


# Rows of the only expert that is used -> the M-blocks they take, and how often each tile of each of them is worked on.
SHARES = {
    "columns of a tile": (16, {0: 2}),
    "tiles": (17, {0: 1}),
    "rows": (33, {0: 1, 1: 1}),
    "rows, and tiles of the rest": (70, {0: 1, 1: 1, 2: 1}),
}


@pytest.mark.parametrize("share", SHARES)
def test_a_cluster_shares_a_claim(share: str) -> None:
    rows, blocks = SHARES[share]
    tile = fmg.default_tile(SPEC, "host").replace(cluster=2)
    problem = Problem(SPEC)
    x = problem.tokens(rows, 1)
    ids, weights = np.tile(np.array([[3, -1]], np.int32), (rows, 1)), np.ones((rows, 2), np.float32)
    with fmg.MoELayer(SPEC, target="host", tile=tile, instrument=fmg.Instrument(trace_events=500)) as layer:
        y = layer(x, ids, weights, fmg.Experts(**problem.weights))
        events = layer.take_trace()
    assert relative_error(y, fmg.reference.moe(SPEC, x, ids, weights, **problem.weights)) <= BOUNDS["float32"]
    plan = plan_kernel(SPEC, tile, "host")
    for work, tiles in ((phase.name, phase.tiles) for phase in plan.phases):
        found = Counter(map(tuple, events[events["work"] == WORK[work]]["what"].tolist()))
        assert found == {(block, column): times for block, times in blocks.items() for column in range(tiles)}


def test_holds_every_task_once() -> None:
    with fmg.MoELayer(SPEC, target="host", instrument=fmg.Instrument(trace_events=500)) as layer:
        call(layer, 70)
        events = layer.take_trace()
        blocks = layer.stats().blocks
        assert not len(layer.take_trace()), "taken events are gone"
        plan = plan_kernel(SPEC, layer.tile, "host")
    for work, tiles in ((phase.name, phase.tiles) for phase in plan.phases):
        found = Counter(map(tuple, events[events["work"] == WORK[work]]["what"].tolist()))
        assert set(found.values()) == {1}
        assert len(found) == blocks * tiles
        assert {column for _, column in found} == set(range(tiles))
    assert sorted(events[events["work"] == WORK["combine"]]["what"][:, 0]) == list(range(70))
    assert (events["start"] <= events["end"]).all()
    whole = events[events["work"] == WORK["kernel"]]
    for thread in whole:
        mine = events[events["party"] == thread["party"]]
        assert (thread["start"] <= mine["start"]).all()
        leave = mine["work"] == WORK["leave"]  # follows the kernel's own span or ends it
        assert (mine["end"][~leave] <= thread["end"]).all()


def test_a_traced_layer_computes_the_same_bits() -> None:
    with fmg.MoELayer(SPEC, target="host") as plain:
        want = call(plain, 33)
    instrument = fmg.Instrument(trace_events=500, delay_ns=50_000)
    with fmg.MoELayer(SPEC, target="host", instrument=instrument) as layer:
        assert call(layer, 33).tobytes() == want.tobytes()


def test_summary_and_file() -> None:
    with fmg.MoELayer(SPEC, target="host", instrument=fmg.Instrument(trace_events=500)) as layer:
        call(layer, 70)
        events = layer.take_trace()
        call(layer, 3)
        call(layer, 3)
        two = layer.take_trace()
        numbers = trace.summarize(events)
        plan = plan_kernel(SPEC, layer.tile, "host")
        assert numbers.tiles == events["work"].tolist().count(WORK["gemm1"]) + events["work"].tolist().count(WORK["gemm2"])
        assert numbers.tiles % plan.tasks == 0
    assert 0 < numbers.listed <= numbers.first_products <= numbers.last_gemm1 <= numbers.last_gemm2 <= numbers.total
    assert numbers.tail == pytest.approx(numbers.total - numbers.last_gemm2)
    assert 0 < numbers.busy_percent <= 100
    with pytest.raises(fmg.SpecError, match="summary is of one call"):
        trace.summarize(two)
    file = json.loads(json.dumps(trace.chrome([events, events])))
    spans = [event for event in file["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 2 * len(events)
    assert {event["pid"] for event in spans} == {0, 1}
    assert min(event["ts"] for event in spans) == 0
    assert {event["name"] for event in spans} <= set(WORKS.values())
    named = {(event["pid"], event["tid"]) for event in file["traceEvents"] if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in spans} == named


def test_what_is_not_recorded_is_none() -> None:
    """Not 0, which would be the best of all times."""
    problem = Problem(SPEC)
    x, ids, weights = problem.tokens(9, 1), np.full((9, 2), -1, np.int32), np.ones((9, 2), np.float32)
    with fmg.MoELayer(SPEC, target="host", instrument=fmg.Instrument(trace_events=500)) as layer:
        call(layer, 9)
        some = vars(trace.summarize(layer.take_trace()))
        layer(x, ids, weights, fmg.Experts(**problem.weights))  # every route is masked: there are no tiles
        none = vars(trace.summarize(layer.take_trace()))
    assert [name for name, value in some.items() if value is None] == ["first_task"], "the host does not record it"
    assert none["tiles"] == 0 and none["total"] > 0
    of_tiles = "first_products last_gemm1 last_gemm2 arrival_to_products tail busy_percent bubble bubble_90 idle_at_end".split()
    assert all(none[name] is None for name in of_tiles)


def test_errors() -> None:
    with fmg.MoELayer(SPEC, target="host") as layer, pytest.raises(fmg.SpecError, match="keeps no trace"):
        layer.take_trace()
    with fmg.MoELayer(SPEC, target="host", instrument=fmg.Instrument(trace_events=1)) as layer:
        call(layer, 5)
        with pytest.raises(fmg.SpecError, match=r"trace_events=1 is not valid\. These calls need \d+"):
            layer.take_trace()
        assert not len(layer.take_trace()), "it starts again"
    for fields in ({"trace_events": -1}, {"delay_ns": True}, {"delay_ns": 2 * 10**9}):
        with pytest.raises(fmg.SpecError, match=r"is not valid\. Must be an integer between"):
            fmg.Instrument(**fields)  # type: ignore[arg-type]
    with pytest.raises(fmg.SpecError, match="not valid for the router"):
        fmg.generate(SPEC, arch="host", kernel="router", instrument=fmg.Instrument(delay_ns=5))
