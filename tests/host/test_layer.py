"""The layer on the host against the float64 reference: shapes, dtypes, routings, world sizes, placements."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import BOUNDS, Problem, World, bits, prebuild, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.dtypes import get_dtype

KINDS = ("uniform", "skewed", "one", "few", "masked", "none")

# What a kernel is compiled for; all else varies at run time. Odd widths: a tail in every loop and tile.
KERNELS: dict[str, dict[str, Any]] = {
    "bf16 gated silu": {"hidden_size": 72, "intermediate_size": 56, "top_k": 3},
    "bf16 gpt-oss": {
        "hidden_size": 48, "intermediate_size": 40, "top_k": 4, "bias": True, "gate_limit": 7.0, "up_offset": 1.0,
        "swish_beta": 1.702, "swish_alpha": 1 / 1.702,
    },
    "bf16 wide": {"hidden_size": 320, "intermediate_size": 704, "top_k": 2},
    "fp16 vanilla gelu": {
        "hidden_size": 40, "intermediate_size": 72, "top_k": 2, "dtype": "float16", "mlp": "vanilla",
        "activation": "gelu", "bias": True,
    },
    "fp16 weight on input": {
        "hidden_size": 64, "intermediate_size": 24, "top_k": 1, "dtype": "float16", "weight_on": "input"
    },
    "fp32 relu": {"hidden_size": 36, "intermediate_size": 20, "top_k": 5, "dtype": "float32", "activation": "relu"},
    "fp32 vanilla identity": {
        "hidden_size": 20, "intermediate_size": 132, "top_k": 8, "dtype": "float32", "mlp": "vanilla",
        "activation": "identity",
    },
    "fp64 gelu_tanh, input, bias": {
        "hidden_size": 34, "intermediate_size": 30, "top_k": 3, "dtype": "float64", "activation": "gelu_tanh",
        "weight_on": "input", "bias": True,
    },
    "fp64 clamp": {
        "hidden_size": 16, "intermediate_size": 18, "top_k": 6, "dtype": "float64", "gate_limit": 0.5, "up_offset": -0.25
    },
}  # fmt: skip
TILE = fmg.TileConfig(block_m=8, block_n=24)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    tiles = [TILE, TILE.replace(cluster=2)]
    prebuild([(problem(name, KERNELS[name]["top_k"]).spec, "moe", tile) for name in KERNELS for tile in tiles])


@functools.cache
def problem(kernel: str, experts: int) -> Problem:
    """Weights of a kernel's layer (they do not depend on world size, capacity or counts)."""
    return Problem(fmg.MoESpec(**KERNELS[kernel], num_experts=experts, max_tokens=1), seed=experts)


@st.composite
def placements(draw: Any, experts: int, world_size: int) -> fmg.Placement:
    owner = draw(st.lists(st.integers(0, world_size - 1), min_size=experts, max_size=experts))
    order = draw(st.permutations(range(experts)))
    return fmg.Placement([[expert for expert in order if owner[expert] == rank] for rank in range(world_size)])


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    world_size = draw(st.integers(1, 4))
    experts = draw(st.integers(KERNELS[kernel]["top_k"], 13))
    return {
        "kernel": kernel,
        "world_size": world_size,
        "experts": experts,
        "placement": draw(placements(experts, world_size)),
        "counts": draw(st.lists(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 90]), min_size=world_size, max_size=world_size)),
        "kinds": draw(st.lists(st.sampled_from(KINDS), min_size=world_size, max_size=world_size)),
        "combine": draw(st.sampled_from(["route", "rank"])),
        "capacity": draw(st.sampled_from([None, None, 1, 5])),
        "processors": draw(st.integers(1, 3)),
        "panel": draw(st.sampled_from([1, 2, 5])),
        "cluster": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict[str, Any]) -> tuple[World, Problem, list[Any]]:
    base = problem(case["kernel"], case["experts"])
    spec = base.spec.replace(max_tokens=90, world_size=case["world_size"], capacity=case["capacity"])
    tile = TILE.replace(cluster=case["cluster"])
    schedule = fmg.Schedule(combine=case["combine"], lag=1, panel=case["panel"])
    world = World(spec, tile=tile, schedule=schedule, placement=case["placement"], processors=case["processors"])
    inputs = [
        (base.tokens(count, case["seed"] + rank), *routes(spec, count, kind, case["seed"] + rank))
        for rank, (count, kind) in enumerate(zip(case["counts"], case["kinds"]))
    ]
    return world, base, inputs


def expected(spec: fmg.MoESpec, base: Problem, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return fmg.reference.moe(spec, x, ids, weights, **base.weights)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_matches_the_reference_on_every_rank(case: dict[str, Any]) -> None:
    world, base, inputs = build(case)
    spec = world.spec
    outputs = world.run(base, inputs)
    for y, (x, ids, weights) in zip(outputs, inputs):
        assert y.shape == x.shape
        error = relative_error(y, expected(spec, base, x, ids, weights))
        assert error <= BOUNDS[spec.dtype], f"relative error {error}"
    again = world.run(base, inputs)
    assert list(map(bits, outputs)) == list(map(bits, again))
    stats = [layer.stats() for layer in world.layers]
    dropped = sum(fmg.reference.drops(spec, ids) for _, ids, _ in inputs)
    assert sum(s.dropped for s in stats) == 2 * dropped
    assert sum(s.masked for s in stats) == 2 * sum(int((ids < 0).sum()) for _, ids, _ in inputs)
    assert sum(s.rows for s in stats) == sum(s.routes for s in stats)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.data())
def test_same_bits_at_every_world_size(case: dict[str, Any], data: Any) -> None:
    """Combine by route: a token's bits depend on nothing but the token, its routes and the weights."""
    case |= {"combine": "route", "capacity": None}
    _, base, inputs = build(case)
    together = tuple(np.concatenate(parts) for parts in zip(*inputs))
    alone = dict(case, world_size=1, counts=[len(together[0])], kinds=["uniform"], placement=None)
    spec = base.spec.replace(max_tokens=360)
    single = World(spec, tile=TILE, processors=alone["processors"])
    whole = bits(single.run(base, [together])[0])
    world, _, _ = build(case)
    assert b"".join(map(bits, world.run(base, inputs))) == whole
    order = data.draw(st.permutations(range(len(together[0]))))
    shuffled = tuple(part[list(order)] for part in together)
    back = np.empty_like(together[0])
    back[list(order)] = single.run(base, [shuffled])[0]
    assert bits(back) == whole


@pytest.mark.parametrize(
    ("tile", "schedule"),
    [
        (fmg.TileConfig(block_m=1, block_n=2), fmg.Schedule()),
        (fmg.TileConfig(block_m=64, block_n=128), fmg.Schedule(lag=0)),
        (TILE, fmg.Schedule(lag=9, panel=4, ring=1)),
    ],
)
def test_same_bits_for_every_tile_and_schedule(tile: fmg.TileConfig, schedule: fmg.Schedule) -> None:
    base = problem("fp32 relu", 7)
    spec = base.spec.replace(max_tokens=60)
    inputs = [(base.tokens(60, 1), *routes(spec, 60, "skewed", 1))]
    want = World(spec, tile=TILE).run(base, inputs)
    assert bits(World(spec, tile=tile, schedule=schedule).run(base, inputs)[0]) == bits(want[0])


@pytest.mark.parametrize("shape", [(2880, 2880, 32, 4), (2048, 1408, 60, 4), (704, 96, 1, 1), (64, 2880, 40, 8)])
def test_real_widths(shape: tuple[int, int, int, int]) -> None:
    spec = fmg.MoESpec(*shape, max_tokens=3)
    rng = np.random.default_rng(0)
    dtype = get_dtype(spec.dtype).numpy
    one = {
        "gate": (rng.standard_normal((spec.intermediate_size, spec.hidden_size)) / 50).astype(dtype),
        "up": (rng.standard_normal((spec.intermediate_size, spec.hidden_size)) / 50).astype(dtype),
        "down": (rng.standard_normal((spec.hidden_size, spec.intermediate_size)) / 50).astype(dtype),
    }
    experts = {name: np.broadcast_to(w, (spec.num_experts, *w.shape)) for name, w in one.items()}  # all experts alike
    x = rng.standard_normal((3, spec.hidden_size)).astype(dtype)
    ids, weights = routes(spec, 3, "uniform", 0)
    with fmg.MoELayer(spec, target="host") as layer:
        y = layer(x, ids, weights, fmg.Experts(**experts))
    assert relative_error(y, fmg.reference.moe(spec, x, ids, weights, **experts)) <= BOUNDS["bfloat16"]


@pytest.mark.parametrize("combine", ["route", "rank"])
def test_eight_ranks(combine: str) -> None:
    base = problem("fp32 relu", 11)
    spec = base.spec.replace(max_tokens=70, world_size=8)
    world = World(spec, tile=TILE, schedule=fmg.Schedule(combine=combine, lag=1))
    for n, counts in enumerate([[70, 0, 1, 33, 5, 0, 16, 17], [0] * 7 + [70], [1] * 8]):
        inputs = [(base.tokens(count, rank), *routes(spec, count, "uniform", rank)) for rank, count in enumerate(counts)]
        for y, (x, ids, weights) in zip(world.run(base, inputs), inputs):
            assert relative_error(y, expected(spec, base, x, ids, weights)) <= BOUNDS["float32"], n


@pytest.mark.parametrize("combine", ["route", "rank"])
def test_the_most_experts_and_routes(combine: str) -> None:
    spec = fmg.MoESpec(16, 16, 1024, 32, dtype="float32", max_tokens=130, world_size=3)
    base = Problem(spec)
    inputs = [(base.tokens(n, rank), *routes(spec, n, "uniform", rank)) for rank, n in enumerate((130, 0, 5))]
    world = World(spec, tile=TILE, schedule=fmg.Schedule(combine=combine, lag=1))
    for y, (x, ids, weights) in zip(world.run(base, inputs), inputs):
        assert relative_error(y, expected(spec, base, x, ids, weights)) <= BOUNDS["float32"]


def test_an_expert_named_twice_takes_two_rows() -> None:
    base = problem("fp32 relu", 7)
    spec = base.spec.replace(max_tokens=4, world_size=2)
    inputs = []
    for rank in range(2):
        ids, weights = routes(spec, 4, "uniform", rank)
        ids[:, 1] = ids[:, 0]
        inputs.append((base.tokens(4, rank), ids, weights))
    for combine in ("route", "rank"):
        outputs = World(spec, tile=TILE, schedule=fmg.Schedule(combine=combine, lag=1)).run(base, inputs)
        for y, (x, ids, weights) in zip(outputs, inputs):
            assert relative_error(y, expected(spec, base, x, ids, weights)) <= BOUNDS["float32"]


def test_num_tokens_leaves_the_other_rows_alone() -> None:
    base = problem("fp32 relu", 7)
    spec = base.spec.replace(max_tokens=20)
    world = World(spec, tile=TILE)
    x = base.tokens(20, 0)
    ids, weights = routes(spec, 20, "uniform", 0)
    ids[12:] = 99  # never looked at
    for count in (0, 1, 12):
        y = world.run(base, [(x, ids, weights)], num_tokens=np.array([count], np.int32))[0]
        assert np.isnan(y[count:]).all()
        assert relative_error(y[:count], expected(spec, base, x[:count], ids[:count], weights[:count])) <= 1e-5


def test_set_placement_between_calls() -> None:
    base = problem("fp32 relu", 7)
    spec = base.spec.replace(max_tokens=20, world_size=2)
    world = World(spec, tile=TILE)
    inputs = [(base.tokens(20, r), *routes(spec, 20, "uniform", r)) for r in range(2)]
    first = world.run(base, inputs)
    for slots in ([[6, 5, 4, 3, 2, 1, 0], []], [[2], [0, 6, 1, 5, 3, 4]]):
        world.placement = fmg.Placement(slots)
        for layer in world.layers:
            layer.set_placement(world.placement)
        assert list(map(bits, world.run(base, inputs))) == list(map(bits, first))


def test_workspace_and_heap_are_reported() -> None:
    spec = problem("fp32 relu", 7).spec.replace(max_tokens=20, world_size=2)
    world = World(spec, tile=TILE)
    layer = world.layers[0]
    assert layer.workspace_bytes == layer._placed.memory.nbytes + sum(t.nbytes for t in layer._placed.tables.values())
    assert layer.comm.scratches.bytes == layer._placed.scratch.memory.nbytes
    rows = spec.max_tokens * spec.hidden_size * 4
    assert layer.comm.heap.bytes >= rows * (1 + spec.top_k)
    assert layer.comm.heap.bytes == layer.comm.heap_memory(0).nbytes
