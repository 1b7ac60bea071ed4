"""Validation of MoESpec and Placement: every refusal names the field and its value."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from flashmoe_gen.errors import FlashMoEError, SpecError, UnsupportedError
from flashmoe_gen.spec import MAX_EXPERTS, MAX_TOKENS, MAX_TOP_K, MAX_WORLD_SIZE, MoESpec, Placement

BASE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2, "max_tokens": 16}


def make(**changes: Any) -> MoESpec:
    return MoESpec(**{**BASE, **changes})


def test_defaults() -> None:
    spec = make()
    assert (spec.dtype, spec.mlp, spec.activation, spec.bias) == ("bfloat16", "gated", "silu", False)
    assert (spec.scoring, spec.renormalize, spec.weight_on, spec.capacity) == ("softmax", True, "output", None)
    assert (spec.group_score, spec.element.size) == ("max", 2)
    assert make(scoring="sigmoid").group_score == "top2_sum"
    assert make(scoring="sigmoid", group_score="max").group_score == "max"


def test_is_a_frozen_value() -> None:
    spec = make()
    assert spec == make() and hash(spec) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top_k = 3  # type: ignore[misc]
    assert spec.replace(top_k=3) == make(top_k=3)
    with pytest.raises(SpecError, match="top_k=9"):
        spec.replace(top_k=9)


def test_numbers_become_floats() -> None:
    spec = make(swish_alpha=1, swish_beta=2, gate_limit=7, up_offset=1, routed_scale=16)
    for name in ("swish_alpha", "swish_beta", "gate_limit", "up_offset", "routed_scale"):
        assert type(getattr(spec, name)) is float


@pytest.mark.parametrize("field", [*BASE, "world_size", "capacity", "num_groups", "top_groups"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_integers(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{field}={value!r} is not valid. Must be")):
        make(**{field: value})


@pytest.mark.parametrize(
    ("field", "limit", "needs"),
    [
        ("num_experts", MAX_EXPERTS, {}),
        ("top_k", MAX_TOP_K, {"num_experts": MAX_EXPERTS}),
        ("max_tokens", MAX_TOKENS, {}),
        ("world_size", MAX_WORLD_SIZE, {}),
        ("hidden_size", 1 << 20, {}),
        ("intermediate_size", 1 << 20, {}),
    ],
)
def test_upper_limits(field: str, limit: int, needs: dict[str, Any]) -> None:
    assert getattr(make(**needs, **{field: limit}), field) == limit
    with pytest.raises(SpecError, match=f"{field}={limit + 1} is not valid. Must be between 1 and {limit}"):
        make(**needs, **{field: limit + 1})


def test_top_k_is_at_most_num_experts() -> None:
    assert make(top_k=8).top_k == 8
    with pytest.raises(SpecError, match=r"top_k=9 is not valid\. Must be between 1 and 8"):
        make(top_k=9)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
@pytest.mark.parametrize(("dtype", "multiple"), [("bfloat16", 8), ("float16", 8), ("float32", 4), ("float64", 2)])
def test_rows_are_multiples_of_16_bytes(field: str, dtype: str, multiple: int) -> None:
    make(**{field: 3 * multiple, "dtype": dtype})
    with pytest.raises(SpecError, match=f"{field}={3 * multiple + 1} is not valid for {dtype}.* {multiple} elements"):
        make(**{field: 3 * multiple + 1, "dtype": dtype})


@pytest.mark.parametrize(
    ("field", "choice"),
    [
        ("dtype", "float64"),
        ("mlp", "vanilla"),
        ("activation", "gelu_tanh"),
        ("weight_on", "input"),
        ("scoring", "sigmoid"),
        ("group_score", "top2_sum"),
    ],
)
@pytest.mark.parametrize("value", ["other", 3, ["silu"]])
def test_choices(field: str, choice: str, value: Any) -> None:
    assert getattr(make(**{field: choice}), field) == choice
    with pytest.raises(SpecError, match=re.escape(f"{field}={value!r} is not valid. Must be one of") + f".*'{choice}'"):
        make(**{field: value})


@pytest.mark.parametrize("field", ["bias", "renormalize", "batch_invariant"])
@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_flags(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{field}={value!r} is not valid. Must be True or False")):
        make(**{field: value})


@pytest.mark.parametrize("field", ["swish_alpha", "swish_beta", "up_offset", "routed_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_numbers(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{field}={value!r} is not valid. Must be a finite number")):
        make(**{field: value})


@pytest.mark.parametrize("value", [0, -7.0, float("nan"), float("inf"), "7", True])
def test_gate_limit(value: Any) -> None:
    with pytest.raises(SpecError, match=re.escape(f"gate_limit={value!r} is not valid. Must be a positive number")):
        make(gate_limit=value)


@pytest.mark.parametrize("fields", [{"gate_limit": 7.0}, {"up_offset": 1.0}])
def test_vanilla_has_no_gate(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="gate_limit and up_offset belong to a gated MLP"):
        make(mlp="vanilla", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 3}, "num_groups=3 is not valid. Must divide num_experts=8"),
        ({"num_groups": 9}, "num_groups=9 is not valid. Must be between 1 and 8"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5 is not valid. Must be between 1 and 4"),
        ({"num_groups": 4, "top_k": 3}, "top_k=3 is not valid. Only 2 experts lie in top_groups=1 of num_groups=4"),
        ({"num_groups": 8, "top_groups": 2, "scoring": "sigmoid"}, "group_score='top2_sum' needs at least two"),
    ],
)
def test_groups(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(**fields)


def test_errors_are_value_errors_of_the_package() -> None:
    for kind in (ValueError, FlashMoEError):
        with pytest.raises(kind):
            make(top_k=0)


@pytest.mark.parametrize(
    ("num_experts", "world_size", "slots"),
    [
        (8, 2, ((0, 1, 2, 3), (4, 5, 6, 7))),
        (7, 3, ((0, 1, 2), (3, 4), (5, 6))),
        (2, 3, ((0,), (1,), ())),
        (3, 1, ((0, 1, 2),)),
    ],
)
def test_default_placement(num_experts: int, world_size: int, slots: tuple[tuple[int, ...], ...]) -> None:
    placement = Placement.default(num_experts, world_size)
    assert placement.slots_per_rank == slots
    assert (placement.num_experts, placement.world_size) == (num_experts, world_size)


def test_placement_owner() -> None:
    placement = Placement([[3, 0], [], [1, 2]])
    assert [placement.owner(expert) for expert in range(4)] == [0, 2, 2, 0]
    assert placement.local_experts(0) == (3, 0)
    assert placement == Placement(((3, 0), (), (1, 2)))


@pytest.mark.parametrize(
    ("slots", "missing"), [([[0], [2]], "Expert 1 of 2"), ([[1], [2]], "Expert 0 of 2"), ([[-1, 0]], "Expert 1 of 2")]
)
def test_placement_misses_an_expert(slots: list[list[int]], missing: str) -> None:
    with pytest.raises(SpecError, match=f"slots_per_rank is not valid. {missing} is missing"):
        Placement(slots)


def test_placement_refuses_replicas() -> None:
    with pytest.raises(UnsupportedError, match="slots_per_rank holds expert 1 more than once"):
        Placement([[0, 1], [1]])
