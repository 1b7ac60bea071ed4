"""The workspace holds what the scheduler may ask of it, for any spec, tile and number of processors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_gen as fmg
from flashmoe_gen.layout import HeapLayout, HeapNeeds, ScratchLayout
from flashmoe_gen.plan import plan_schedule
from flashmoe_gen.programs import plan_kernel


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    max_tokens=st.sampled_from([1, 2, 127, 4096]),
    top_k=st.integers(1, 8),
    world_size=st.integers(1, 8),
    local_experts=st.sampled_from([0, 1, 2, 16, 64]),
    size=st.sampled_from([(64, 32), (2048, 768), (4096, 14336)]),
    panel=st.sampled_from([None, 1, 3, 5, 8, 64]),
    ring=st.sampled_from([None, 1, 2, 3, 64, 65536]),
    lag=st.sampled_from([None, 0, 1, 1024]),
    cluster=st.sampled_from([1, 2]),
    processors=st.sampled_from([1, 2, 65, 131]),
)
def test_panels_fit_the_ring_and_the_queue(
    max_tokens: int,
    top_k: int,
    world_size: int,
    local_experts: int,
    size: tuple[int, int],
    panel: int | None,
    ring: int | None,
    lag: int | None,
    cluster: int,
    processors: int,
) -> None:
    spec = fmg.MoESpec(*size, 512, top_k, max_tokens=max_tokens, world_size=world_size)
    tile = fmg.default_tile(spec, "sm_90a").replace(cluster=cluster)
    plan = plan_kernel(spec, tile, "sm_90a")
    schedule = fmg.Schedule(lag=lag, panel=panel, ring=ring)
    order = plan_schedule(
        spec, tile, plan, schedule, combine="route", local_experts=local_experts, processors=processors
    )
    layout = ScratchLayout.of(spec, tile, plan, order, local_experts=local_experts, planners=processors * cluster)
    most, slots = order.max_panel, order.ring_slots
    assert most % cluster == 0 and cluster <= most <= slots, "a panel that never fits would never be issued"
    assert ring is None or slots <= max(ring, cluster)
    assert layout.rest["ring"].bytes == slots * tile.block_m * spec.intermediate_size * spec.element.size
    # The worst routing: as many experts as can be have one row, and one has the rest, whose last claim takes all it may.
    rows = max_tokens * top_k * world_size if local_experts else 0
    experts = min(local_experts, rows)
    heights = [rows - experts + 1, *[1] * (experts - 1)] if experts else []
    entries = sum(-(-height // (cluster * tile.block_m)) * cluster for height in heights)
    assert entries <= layout.needs.panels, "an M-block would have no entry"


def bytes_of(model: str, max_tokens: int, world_size: int, combine: str) -> tuple[int, int]:
    """Heap and scratch of a rank on a GPU of 132 multiprocessors."""
    spec = fmg.MoESpec.preset(model, max_tokens=max_tokens, world_size=world_size)
    tile = fmg.default_tile(spec, "sm_90a")
    plan = plan_kernel(spec, tile, "sm_90a")
    experts = -(-spec.num_experts // world_size)
    order = plan_schedule(
        spec, tile, plan, fmg.Schedule(), combine=combine, local_experts=experts, processors=65  # type: ignore[arg-type]
    )
    scratch = ScratchLayout.of(spec, tile, plan, order, local_experts=experts, planners=130)
    return HeapLayout.of(HeapNeeds.of(spec), world_size).bytes, scratch.needs.bytes


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize(
    "model, max_tokens, world_size, most",
    [
        ("qwen3-30b-a3b", 8192, 1, 350e6),
        ("qwen3-30b-a3b", 8192, 2, 800e6),
        ("deepseek-v3", 8192, 8, 2.5 * 2**30),
        ("deepseek-v3", 1024, 64, 2 * 2**30),
    ],
)
def test_memory_does_not_multiply(model: str, max_tokens: int, world_size: int, most: float, combine: str) -> None:
    """For 48 layers: each has 64 KB at most for itself."""
    assert sum(bytes_of(model, max_tokens, world_size, combine)) + 48 * 2**16 <= most


@pytest.mark.parametrize("model", fmg.PRESETS)
def test_the_intermediate_fits_the_l2_of_a_gpu(model: str) -> None:
    spec = fmg.MoESpec.preset(model, max_tokens=8192)
    tile = fmg.default_tile(spec, "sm_90a")
    plan = plan_kernel(spec, tile, "sm_90a")
    order = plan_schedule(
        spec, tile, plan, fmg.Schedule(), combine="route", local_experts=spec.num_experts, processors=65
    )
    assert order.ring_slots * tile.block_m * plan.rows.middle.bytes <= 48 << 20


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    max_tokens=st.integers(1, 5000),
    top_k=st.integers(1, 8),
    world_size=st.integers(1, 64),
    heap_mib=st.integers(0, 4096),
)
def test_a_layout_fills_a_heap_of_a_given_size(max_tokens: int, top_k: int, world_size: int, heap_mib: int) -> None:
    needs = HeapNeeds.of(fmg.MoESpec(2048, 768, 64, top_k, max_tokens=max_tokens, world_size=world_size))
    exact, filled = HeapLayout.of(needs, world_size), HeapLayout.filling(needs, world_size, heap_mib << 20)
    assert not needs.fits(filled.needs)
    if exact.bytes <= heap_mib << 20:
        assert exact.bytes <= filled.bytes <= heap_mib << 20
        twice = needs.times(2, 1)
        assert not twice.fits(filled.needs) or HeapLayout.of(twice, world_size).bytes > heap_mib << 20
    else:
        assert filled.bytes == exact.bytes
    addresses = [region.offset for region in filled.regions.values()]
    assert addresses == sorted(addresses)


def test_what_does_not_fit_is_named() -> None:
    small, large = (HeapNeeds.of(fmg.MoESpec(64, 64, 8, 2, max_tokens=count)) for count in (10, 20))
    assert small.fits(large) == ""
    assert large.fits(small).startswith("max_tokens=20 (there is room for 10), routes=40 (there is room for 20)")
