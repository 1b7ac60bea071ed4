"""Several ranks on one GPU, slowed down at random before they publish anything: no order of arrival changes a bit.

The output is the same from run to run for a fixed placement, whichever way rows come back, so every call is compared with
the same call of ranks without delays. Calls are queued without waiting for results: ranks run ahead of each other as
far as the protocol lets them.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from ranks import (
    BF16,
    BOUNDS,
    KINDS,
    Case,
    Problem,
    Ranks,
    build,
    device_experts,
    inputs_of,
    make,
    relative_error,
    runs_here,
)

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu

CALLS = 60
QUEUED = 12  # calls in flight
SLOTS = [[3, 1, 0], [6, 2, 4, 5], []]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compile the kernels with and without delays, which are four texts whatever the delay."""
    kernels = [make(way) for way in filter(runs_here, BF16)]
    instruments = None, fmg.Instrument(delay_ns=1)
    build((spec, {"tile": tile, "instrument": instrument}) for spec, tile in kernels for instrument in instruments)


@functools.cache
def calls_of(world_size: int) -> tuple[Problem, list[list[Case]]]:
    """Calls with random counts, zero included, and every kind of routing, in turn and by rank."""
    problem = Problem(fmg.MoESpec(144, 208, 7, 3, max_tokens=300))
    rng = np.random.default_rng(world_size)
    calls = []
    for n in range(CALLS):
        counts = [int(count) for count in rng.choice([0, 0, 1, 15, 16, 17, 33, 150, 300], world_size)]
        kinds = [KINDS[(n + rank * (n // len(KINDS))) % len(KINDS)] for rank in range(world_size)]
        by_kind = {kind: inputs_of(problem, problem.spec, counts, kind, seed=10 * n) for kind in kinds}
        calls.append([by_kind[kind][rank] for rank, kind in enumerate(kinds)])
    return problem, calls


@functools.cache
def references(world_size: int) -> list[list[np.ndarray]]:
    problem, calls = calls_of(world_size)
    return [[problem.reference(*case) for case in inputs] for inputs in calls]


def results(way: str, combine: str, delays: tuple[int, ...]) -> list[list[np.ndarray]]:
    """The outputs of all calls, with delays of up to that many microseconds per rank."""
    spec, tile = make(way, world_size=len(delays))
    problem, calls = calls_of(len(delays))
    instruments = [fmg.Instrument(delay_ns=1000 * delay) if delay else None for delay in delays]
    placement = fmg.Placement(SLOTS[: len(delays)])
    ranks = Ranks(spec, tile, placement, schedule=fmg.Schedule(combine=combine), instruments=instruments)
    return [
        outputs
        for start in range(0, CALLS, QUEUED)
        for outputs in ranks.run_all(problem, calls[start : start + QUEUED])
    ]


@functools.cache
def undisturbed(way: str, combine: str, world_size: int) -> list[list[np.ndarray]]:
    """What ranks without delays compute, which is close to the reference."""
    found = results(way, combine, (0,) * world_size)
    for outputs, wanted in zip(found, references(world_size)):
        for y, want in zip(outputs, wanted):
            assert relative_error(y, want) <= BOUNDS[way]
    return found


@pytest.mark.parametrize(
    "delays", [(50, 0), (0, 50), (50, 50), (5, 50), (50, 0, 0), (0, 50, 50), (0, 0, 50), (20, 50, 80)], ids=str
)
@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("way", BF16)
def test_delays_change_no_bit(way: str, combine: str, delays: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "20")
    want = undisturbed(way, combine, len(delays))
    for n, (outputs, expected) in enumerate(zip(results(way, combine, delays), want)):
        for rank, (y, same) in enumerate(zip(outputs, expected)):
            assert y.tobytes() == same.tobytes(), f"call {n}, rank {rank}, {len(y)} tokens"


@pytest.mark.parametrize("way", BF16)
def test_delays_delay(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    x, ids, weights = map(cupy.asarray, inputs_of(problem, spec, [300], "uniform")[0])
    experts, out = device_experts(problem, tuple(range(spec.num_experts))), cupy.empty_like(x)
    times = []
    for instrument in (None, fmg.Instrument(delay_ns=1_000_000)):
        with fmg.MoELayer(spec, target="cuda", tile=tile, instrument=instrument) as layer:
            layer(x, ids, weights, experts, out=out)
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            for _ in range(20):
                layer(x, ids, weights, experts, out=out)
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 20)
    quick, slow = times
    assert slow > quick + 0.2, f"{slow} ms with delays of up to 1 ms, {quick} ms without"
