"""The workspace holds what the scheduler may ask of it, for any spec, tile and number of processors."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_gen as fmg
from flashmoe_gen.layout import ScratchLayout
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
