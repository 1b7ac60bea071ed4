"""Numbers as users have them: NumPy's are those of Python, and what has no meaning or no room is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen.errors import SpecError, UnsupportedError
from flashmoe_gen.plan import plan_schedule
from flashmoe_gen.programs import plan_kernel
from flashmoe_gen.spec import MAX_TOKENS

SPEC: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2, "max_tokens": 16, "world_size": 2,
    "num_groups": 4, "top_groups": 2, "capacity": 7,
}  # fmt: skip
NUMBERS: dict[str, Any] = {
    "swish_alpha": 0.5,
    "swish_beta": 2.0,
    "gate_limit": 7.0,
    "up_offset": 1.0,
    "routed_scale": 2.5,
}
TILE: dict[str, Any] = {
    "block_m": 64, "block_n": 128, "block_k": 64, "stages": 3, "warps_m": 2, "warps_n": 2, "lag": 3, "group": 2, "cluster": 1
}  # fmt: skip
INSTRUMENT: dict[str, Any] = {"trace_events": 16, "delay_ns": 100}
MADE: dict[Any, dict[str, Any]] = {fmg.MoESpec: SPEC, fmg.TileConfig: TILE, fmg.Instrument: INSTRUMENT}
INTEGERS = [(kind, name) for kind, fields in MADE.items() for name in fields]


@pytest.mark.parametrize("number", [np.int64, np.int32, np.int16, np.uint8, np.uint64])
@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_integers_of_numpy_are_those_of_python(kind: Any, number: Any) -> None:
    plain, other = kind(**MADE[kind]), kind(**{name: number(value) for name, value in MADE[kind].items()})
    assert (plain, hash(plain), repr(plain)) == (other, hash(other), repr(other))
    assert {type(value) for value in vars(other).values()} == {type(value) for value in vars(plain).values()}
    json.dumps(vars(other))


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, np.longdouble, int, np.int64])
def test_numbers_of_numpy_are_those_of_python(number: Any) -> None:
    given = {name: number(value) for name, value in NUMBERS.items() if number(value)}
    plain = fmg.MoESpec(**SPEC, **{name: float(value) for name, value in given.items()})
    other = fmg.MoESpec(**SPEC, **given)
    assert (plain, hash(plain), repr(plain)) == (other, hash(other), repr(other))
    assert all(type(getattr(other, name)) is float for name in NUMBERS)


def test_flags_and_names_of_numpy() -> None:
    names = {"dtype": "float16", "mlp": "gated", "activation": "gelu", "scoring": "sigmoid", "group_score": "max"}
    flags = {"bias": True, "renormalize": False, "batch_invariant": True}
    plain = fmg.MoESpec(**SPEC, **names, **flags)
    other = fmg.MoESpec(
        **SPEC,
        **{name: np.str_(value) for name, value in names.items()},
        **{name: np.bool_(value) for name, value in flags.items()},
    )
    assert (plain, hash(plain), repr(plain)) == (other, hash(other), repr(other))
    assert {type(getattr(other, name)) for name in names} == {str} and {
        type(getattr(other, name)) for name in flags
    } == {bool}
    tile = fmg.TileConfig(**TILE, program=np.str_("mma"), math=np.str_("ffma"))
    assert repr(tile) == repr(fmg.TileConfig(**TILE, program="mma", math="ffma"))
    assert repr(fmg.Schedule(combine=np.str_("rank"))) == repr(fmg.Schedule(combine="rank"))


def test_the_text_is_the_same() -> None:
    numpy = {name: np.int64(value) for name, value in SPEC.items()} | {
        name: np.float64(value) for name, value in NUMBERS.items()
    }
    tile = fmg.TileConfig(**{name: np.int32(value) for name, value in TILE.items()})
    one = fmg.generate(fmg.MoESpec(**SPEC, **NUMBERS, bias=True), arch="sm_80", tile=fmg.TileConfig(**TILE))
    other = fmg.generate(fmg.MoESpec(**numpy, bias=np.bool_(True)), arch="sm_80", tile=tile)  # type: ignore[arg-type]
    assert (one.text, one.digest, one.metadata) == (other.text, other.digest, other.metadata)


@pytest.mark.parametrize(("kind", "name"), INTEGERS)
def test_no_integers(kind: Any, name: str) -> None:
    for value in (True, np.bool_(True), 1.0, np.float64(2), "2", b"2", [2], np.array([2, 3]), 2 + 0j, float("nan")):
        with pytest.raises(SpecError, match=f"^{name}=.* is not valid"):
            kind(**{**MADE[kind], name: value})


@pytest.mark.parametrize(("kind", "name"), INTEGERS)
def test_integers_out_of_range(kind: Any, name: str) -> None:
    for value in (-1, 2**31, 2**32 + 1, 2**40, 2**63, 2**64, -(2**63), 10**5000, np.uint64(2**63), np.int64(-1)):
        with pytest.raises(SpecError, match=f"^{name}=.* is not valid. Must be .*between"):
            kind(**{**MADE[kind], name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_no_numbers(name: str) -> None:
    missing = [] if name == "gate_limit" else [None]
    for value in (
        True,
        np.bool_(False),
        "1",
        *missing,
        [1.0],
        1j,
        float("nan"),
        np.float32("inf"),
        10**5000,
        -(10**400),
    ):
        with pytest.raises(SpecError, match=f"^{name}=.* is not valid. Must be a (finite|positive) number"):
            fmg.MoESpec(**{**SPEC, **NUMBERS, name: value})


@pytest.mark.parametrize("value", [3, None, np.array(["gated", "silu"]), ["gated"], b"gated", {}])
@pytest.mark.parametrize("name", ["dtype", "mlp", "activation", "weight_on", "scoring"])
def test_no_names(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"^{name}=.*is not valid. Must be one of"):
        fmg.MoESpec(**{**SPEC, name: value})


def test_placements() -> None:
    plain = fmg.Placement([[1, 0], [2]])
    other = fmg.Placement([np.array([1, 0]), np.array([2], np.uint8)])
    assert (plain, hash(plain), repr(plain)) == (other, hash(other), repr(other))
    assert fmg.Placement.default(np.int64(3), np.int32(2)) == fmg.Placement([[0, 1], [2]])  # type: ignore[arg-type]
    assert plain.owner(np.int64(2)) == 1 and plain.local_experts(np.int32(0)) == (1, 0)  # type: ignore[arg-type]
    for slots in (5, [5], None, [[0], None]):
        with pytest.raises(SpecError, match=r"slots_per_rank=.* is not valid. Must be a list of experts for each rank"):
            fmg.Placement(slots)  # type: ignore[arg-type]
    for expert in (1.0, True, "1", None, 2**70):
        with pytest.raises(SpecError, match=r"slots_per_rank\[1\]\[0\]=.* is not valid"):
            fmg.Placement([[0], [expert]])  # type: ignore[list-item]
    for experts, ranks in ((0, 1), (3, 0), (3, 65), (3, True), (2.0, 1)):
        with pytest.raises(SpecError, match="is not valid"):
            fmg.Placement.default(experts, ranks)  # type: ignore[arg-type]
    for call in (plain.owner, plain.local_experts):
        for index in (-1, 3, 2**70, 0.0):
            with pytest.raises(SpecError, match="is not valid"):
                call(index)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"top_k": 32, "num_experts": 64, "world_size": 8}, "rows="),
        ({"top_k": 32, "num_experts": 64, "hidden_size": 1 << 16}, "tasks="),
        ({"intermediate_size": 1 << 20, "num_experts": 64, "top_k": 8}, "tasks="),
    ],
)
def test_counts_that_no_kernel_can_hold(fields: dict[str, Any], count: str) -> None:
    spec = fmg.MoESpec(**{"hidden_size": 64, "intermediate_size": 64, "max_tokens": MAX_TOKENS, **fields})
    tile = fmg.default_tile(spec, "host")
    most = {"combine": "rank", "local_experts": spec.num_experts, "processors": 2}
    with pytest.raises(UnsupportedError, match=f"max_tokens={MAX_TOKENS} with top_k={spec.top_k} .*{count}"):
        plan_schedule(spec, tile, plan_kernel(spec, tile, "host"), fmg.Schedule(), **most)
    small = spec.replace(max_tokens=4096)
    order = plan_schedule(small, tile, plan_kernel(small, tile, "host"), fmg.Schedule(), **most)
    assert max(order.arguments().values()) < 2**31
