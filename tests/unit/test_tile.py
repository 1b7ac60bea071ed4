"""Tiles change a kernel's text, schedules do not; and the fields that moved from one to the other."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest

import flashmoe_gen as fmg
from flashmoe_gen.plan import plan_schedule
from flashmoe_gen.programs import plan_kernel
from flashmoe_gen.tile import resolve_schedule

SPEC = fmg.MoESpec(64, 48, 8, 2, max_tokens=500, world_size=2)
TILE = fmg.default_tile(SPEC, "host")
OLD = {"combine": ("combine", "rank"), "lag": ("lag", 3), "group": ("panel", 4)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "sum"}, "combine='sum' is not valid. Must be one of 'route', 'rank' or None."),
        ({"lag": -1}, "lag=-1 is not valid. Must be None or an integer between 0 and 1024."),
        ({"panel": 0}, "panel=0 is not valid. Must be None or an integer between 1 and 64."),
        ({"ring": 0}, "ring=0 is not valid. Must be None or an integer between 1 and 65536."),
        ({"ring": True}, "ring=True is not valid"),
    ],
)
def test_a_schedule_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fmg.SpecError) as caught:
        fmg.Schedule().replace(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("old", OLD)
def test_old_fields_warn_and_still_work(old: str) -> None:
    new, value = OLD[old]
    with pytest.warns(DeprecationWarning, match=rf"TileConfig\({old}=\) is deprecated: pass schedule=Schedule\({new}=\)"):
        tile = TILE.replace(**{old: value})
    schedule = fmg.Schedule(**{new: value})  # type: ignore[arg-type]
    assert resolve_schedule(tile, None) == schedule
    assert resolve_schedule(TILE, schedule) == schedule
    assert fmg.generate(SPEC, arch="host", tile=tile).text == fmg.generate(SPEC, arch="host", tile=TILE).text
    with pytest.raises(fmg.SpecError, match=rf"TileConfig\({old}=.*\) and schedule= are not valid together"):
        resolve_schedule(tile, schedule)


def test_a_layer_takes_the_old_fields_and_the_new_ones() -> None:
    with pytest.warns(DeprecationWarning):
        old = TILE.replace(combine="rank", lag=2, group=3)
    comms = fmg.comm.local_group(2)
    schedule = fmg.Schedule(combine="rank", lag=2, panel=3)
    one = fmg.MoELayer(SPEC, target="host", tile=old, comm=comms[0])
    other = fmg.MoELayer(SPEC, target="host", schedule=schedule, comm=comms[0])
    with one, other:
        assert one.schedule == other.schedule == schedule
        assert one._placed.order == other._placed.order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": {"ring": 1}}, r"^schedule is a dict\. Must be a flashmoe_gen\.Schedule\."),
        ({"schedule": TILE}, r"^schedule is a TileConfig\. Must be a flashmoe_gen\.Schedule\."),
        ({"tile": fmg.Schedule()}, r"^tile is a Schedule\. Must be a flashmoe_gen\.TileConfig\."),
    ],
)
def test_one_taken_for_the_other_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fmg.SpecError, match=message):
        fmg.MoELayer(SPEC.replace(world_size=1), target="host", **options)


def test_no_warning_without_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TILE.replace(block_m=16)
        fmg.TileConfig(16, 32)


def test_a_schedule_reaches_the_launch() -> None:
    plan = plan_kernel(SPEC, TILE, "host")
    fields: dict[str, Any] = {"combine": "route", "local_experts": 4, "processors": 3}
    order = plan_schedule(SPEC, TILE, plan, fmg.Schedule(lag=5, panel=2, ring=9), **fields)
    assert (order.lag, order.max_panel, order.ring_slots) == (5, 2, 9)
    small = plan_schedule(SPEC, TILE, plan, fmg.Schedule(panel=64, ring=6), **fields)
    assert (small.max_panel, small.ring_slots) == (3, 6), "two panels fit the ring"
    assert set(dataclasses.asdict(order)) == set(dataclasses.asdict(small))
