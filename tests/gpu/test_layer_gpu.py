"""The layer on a GPU against the float64 reference: dtypes, MLPs, routings, counts, ranks, placements, capacities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import (
    BF16,
    BOUNDS,
    GPT_OSS,
    KINDS,
    Problem,
    Ranks,
    assert_close,
    build,
    device_experts,
    inputs_of,
    make,
    relative_error,
    runs_here,
)

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, dict[str, Any]] = {
    "gated silu": {"mlp": "gated"},
    "gated gpt-oss": {"mlp": "gated", **GPT_OSS},
    "gated gelu, weight on input": {"mlp": "gated", "activation": "gelu", "weight_on": "input", "bias": True},
    "vanilla relu": {"mlp": "vanilla", "activation": "relu"},
    "vanilla gelu_tanh, bias": {"mlp": "vanilla", "activation": "gelu_tanh", "bias": True},
    "vanilla identity": {"mlp": "vanilla", "activation": "identity"},
}


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """Compile the kernels of the large tables on all cores: one after the other would take minutes."""
    wanted = []
    for item in request.session.items:
        table = getattr(item, "callspec", None) and item.callspec.params
        if item.module is request.module and table and runs_here(table["way"]) and {"variant", "shape"} & set(table):
            fields = VARIANTS[table["variant"]] if "variant" in table else {"shape": table["shape"], "max_tokens": 70}
            spec, tile = make(table["way"], **fields)
            wanted.append((spec, {"tile": tile}))
    build(wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", BOUNDS)
def test_matches_the_reference(way: str, variant: str) -> None:
    spec, tile = make(way, **VARIANTS[variant])
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    worst = 0.0
    for kind in KINDS:
        for count in (0, 1, 2, 17, 64, 130, 300):
            case = inputs_of(problem, spec, [count], kind, seed=count)
            (y,) = ranks.run(problem, case)
            (again,) = ranks.run(problem, case)
            assert y.tobytes() == again.tobytes(), f"{kind}, {count} tokens: other bits in the second run"
            error = relative_error(y, problem.reference(*case[0]))
            worst = max(worst, error)
            assert error <= BOUNDS[way], f"{kind}, {count} tokens: relative error {error}"
    print(f"\n{way}, {variant}: worst relative error {worst:.2e}")


@pytest.mark.parametrize(
    "shape", [(2880, 2880, 8, 4), (2048, 768, 128, 8), (2048, 1408, 60, 4), (704, 96, 1, 1), (64, 2880, 40, 8)]
)
@pytest.mark.parametrize("way", BF16)
def test_real_widths(way: str, shape: tuple[int, int, int, int]) -> None:
    spec, tile = make(way, shape=shape, max_tokens=70)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    for count in (1, 70):
        case = inputs_of(problem, spec, [count], "uniform")
        assert_close(problem, case[0], ranks.run(problem, case)[0], BOUNDS[way])


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", BF16)
def test_ranks_on_one_gpu(way: str, world_size: int, combine: str) -> None:
    spec, tile = make(way, world_size=world_size)
    problem = Problem(spec)
    slots = [[3, 1, 0], [6, 2, 4, 5], []][:world_size]
    ranks = Ranks(spec, tile, fmg.Placement(slots), schedule=fmg.Schedule(combine=combine))
    single = Ranks(spec.replace(world_size=1), tile)
    rng = np.random.default_rng(0)
    for n in range(40):
        counts = [int(c) for c in rng.choice([0, 1, 16, 33, 150, 300], world_size)]
        case = inputs_of(problem, spec, counts, KINDS[n % len(KINDS)], seed=n)
        outputs = ranks.run(problem, case, clean=n % 2 == 0)
        for y, part in zip(outputs, case):
            assert_close(problem, part, y, BOUNDS[way])
            if combine == "route":
                assert y.tobytes() == single.run(problem, [part])[0].tobytes()


@pytest.mark.parametrize("way", ["tf32/mma", "ffma/mma", "float64/mma", "float16/wgmma"])
def test_ranks_in_other_dtypes(way: str) -> None:
    spec, tile = make(way, world_size=2, **GPT_OSS)
    problem = Problem(spec)
    for combine in ("route", "rank"):
        ranks = Ranks(spec, tile, fmg.Placement([[5, 0, 3], [1, 6, 2, 4]]), schedule=fmg.Schedule(combine=combine))
        for kind in KINDS:
            case = inputs_of(problem, spec, [130, 45], kind)
            for y, part in zip(ranks.run(problem, case), case):
                assert_close(problem, part, y, BOUNDS[way])


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BF16)
def test_a_placement_set_between_calls_changes_no_result(way: str, combine: str) -> None:
    spec, tile = make(way, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile, schedule=fmg.Schedule(combine=combine))
    case = inputs_of(problem, spec, [150, 33], "uniform")
    first = [y.tobytes() for y in ranks.run(problem, case)]
    for slots in ([[6, 5, 4, 3, 2, 1, 0], []], [[], [0, 6, 1, 5, 3, 4, 2]], [[4, 5, 6], [3, 0, 1, 2]]):
        ranks.set_placement(fmg.Placement(slots))
        for _ in range(2):
            outputs = ranks.run(problem, case)
            for y, part in zip(outputs, case):
                assert_close(problem, part, y, BOUNDS[way])
            if combine == "route":
                assert [y.tobytes() for y in outputs] == first


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("capacity", [1, 9])
@pytest.mark.parametrize("way", BF16)
def test_capacity_drops_the_last_tokens(way: str, capacity: int, combine: str) -> None:
    spec, tile = make(way, capacity=capacity, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile, schedule=fmg.Schedule(combine=combine))
    dropped = 0
    for n, counts in enumerate([[300, 40], [0, 300], [1, 2], [33, 0], [128, 129]]):
        case = inputs_of(problem, spec, counts, KINDS[n], seed=n)
        for y, part in zip(ranks.run(problem, case), case):
            assert_close(problem, part, y, BOUNDS[way])
        dropped += sum(fmg.reference.drops(spec, ids) for _, ids, _ in case)
    assert sum(layer.stats().dropped for layer in ranks.layers) == dropped > 0


def test_stats_count_every_route() -> None:
    spec, tile = make(BF16[0], world_size=3, capacity=20)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [300, 0, 17], "masked")
    for _ in range(2):
        ranks.run(problem, case)
    stats = [layer.stats() for layer in ranks.layers]
    for found, (_, ids, _) in zip(stats, case):
        dropped = fmg.reference.drops(spec, ids)
        assert found.calls == 2
        assert found.masked == 2 * int((ids < 0).sum())
        assert found.dropped == 2 * dropped
        assert found.routes == 2 * (int((ids >= 0).sum()) - dropped)
    assert sum(found.rows for found in stats) == sum(found.routes for found in stats) > 0
    assert all(found.padding >= 0 for found in stats)


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BF16)
def test_the_most_experts_and_routes(way: str, combine: str) -> None:
    spec, tile = make(way, shape=(64, 64, 1024, 32), max_tokens=130, world_size=3)
    problem = Problem(spec)
    case = inputs_of(problem, spec, [130, 0, 5], "uniform")
    for y, part in zip(Ranks(spec, tile, schedule=fmg.Schedule(combine=combine)).run(problem, case), case):
        assert_close(problem, part, y, BOUNDS[way])


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BF16)
def test_an_expert_named_twice_takes_two_rows(way: str, combine: str) -> None:
    spec, tile = make(way, world_size=2)
    problem = Problem(spec)
    case = inputs_of(problem, spec, [40, 7], "uniform")
    for _, ids, _ in case:
        ids[:, 1] = ids[:, 0]
    for y, part in zip(Ranks(spec, tile, schedule=fmg.Schedule(combine=combine)).run(problem, case), case):
        assert_close(problem, part, y, BOUNDS[way])


def test_layers_of_two_programs_share_a_heap() -> None:
    first_spec, first_tile = make(BF16[0], world_size=2)
    second_spec, second_tile = make(BF16[1], shape=(1024, 96, 9, 2), world_size=2, max_tokens=70)
    comms = fmg.comm.local_group(2)
    for comm in comms:  # the second layer has wider rows, the first more of them
        comm.reserve(first_spec, second_spec)
    first = Problem(first_spec), Ranks(first_spec, first_tile, schedule=fmg.Schedule(combine="rank"), comms=comms)
    case = inputs_of(first[0], first_spec, [20, 300], "uniform")
    first[1].run(first[0], case)
    second = Problem(second_spec), Ranks(second_spec, second_tile, schedule=fmg.Schedule(combine="route"), comms=comms)
    for n in range(12):
        problem, ranks = (first, second)[n % 2]
        case = inputs_of(problem, ranks.spec, [(70 * n) % 71, 70 - n], KINDS[n % len(KINDS)], seed=n)
        for y, part in zip(ranks.run(problem, case, clean=n % 3 == 0), case):
            assert_close(problem, part, y, BOUNDS["bfloat16/mma"])


def test_ids_that_are_no_experts_are_reported() -> None:
    spec, tile = make(BF16[0])
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [20], "uniform")
    case[0][1][3, 1] = 7
    with pytest.raises(fmg.SpecError, match="1 ids that are not below num_experts=7"):
        ranks.run(problem, case)
    case = inputs_of(problem, spec, [20], "uniform")
    assert_close(problem, case[0], ranks.run(problem, case)[0], BOUNDS["bfloat16/mma"])


@pytest.mark.parametrize("way", BF16)
def test_a_rank_that_never_calls_meets_the_deadline(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    spec, tile = make(way, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [200, 100], "uniform")
    ranks.run(problem, case)
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.5")
    x, ids, weights = map(cupy.asarray, case[0])
    y = ranks.layers[0](
        x, ids, weights, device_experts(problem, ranks.placement.local_experts(0)), stream=ranks.streams[0]
    )
    cupy.cuda.runtime.deviceSynchronize()
    assert np.isnan(cupy.asnumpy(y).astype(np.float32)).all()
    with pytest.raises(fmg.KernelTimeoutError, match="of rank 1"):
        ranks.layers[0].check()
    with pytest.raises(fmg.CommError, match="rank 0"):
        ranks.layers[1].check()
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "20")
    ranks.comms[0]._transport.clear()
    for y, part in zip(ranks.run(problem, case), case):
        assert_close(problem, part, y, BOUNDS[way])
