"""Processes that disagree raise on all ranks, by name, at the moment they disagree; and go on afterwards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from group import Group, error_of, join
from work import SPEC, call, layer_of

import flashmoe_gen as fmg
from flashmoe_gen.comm import processes
from flashmoe_gen.fused import Fused

# What rank 1 has otherwise than the others.
CHANGES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_experts": 16,
    "top_k": 3,
    "dtype": "bfloat16",
    "activation": "gelu",
    "mlp": "vanilla",
    "bias": True,
    "weight_on": "input",
    "renormalize": False,
    "capacity": 4,
    "max_tokens": 65,
    "batch_invariant": True,
    "swish_alpha": 1.5,
}
OTHER = fmg.Placement([[7, 6, 5, 4], [3, 2, 1, 0]])


Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two ranks returned of the functions below."""
    work = "specs placements reservations unable slow out_of_step starting"
    return Group(tmp_path_factory.mktemp("agreement"), __name__, work, 2, FLASHMOE_TIMEOUT_S="20").results()


def specs(changes: list[str] | None = None) -> list[str]:
    comm = join()
    spec, errors = SPEC.replace(world_size=comm.world_size), []
    for change in changes or ["max_tokens", "num_experts", "capacity"]:
        mine = spec.replace(**{change: CHANGES[change]}) if comm.rank == 1 else spec
        errors.append(error_of(lambda: fmg.MoELayer(mine, comm=comm)))  # noqa: B023
    call(layer_of(comm))
    return errors


def test_other_specs(told: Told) -> None:
    assert told[0]["specs"] == told[1]["specs"]
    for change, error in zip(("max_tokens", "num_experts", "capacity"), told[0]["specs"]):
        assert error.startswith("CommError: The ranks disagree on layer 0: ")
        assert f"{change}={getattr(SPEC, change)!r} on rank 0 and {change}={CHANGES[change]!r} on rank 1" in error


@pytest.mark.full
def test_any_other_field(tmp_path: Path) -> None:
    for errors in Group(tmp_path, __name__, "specs", 3, list(CHANGES)).results(timeout=250):
        for change, error in zip(CHANGES, errors):
            assert f"{change}={CHANGES[change]!r} on rank 1" in error and " on ranks 0, 2" in error


def placements() -> list[str]:
    comm = join()
    mine = OTHER if comm.rank else None
    errors = [error_of(lambda: layer_of(comm, placement=mine))]
    layer = layer_of(comm)
    before = call(layer)
    errors.append(error_of(lambda: layer.set_placement(mine or layer.placement)))
    errors.append(error_of(lambda: layer.set_placement(fmg.Placement([[0], [1]]) if comm.rank else OTHER)))
    assert call(layer) == before  # all have the placement of before
    layer.set_placement(OTHER)
    assert call(layer) == before  # a sum of the same rows in the same order
    return errors


def test_another_placement(told: Told) -> None:
    first, second = (rank["placements"] for rank in told)
    assert first[:2] == second[:2]
    assert "disagree on layer 0: placement[0][0]=0 on rank 0 and placement[0][0]=7 on rank 1" in first[0]
    assert "disagree on placement 0 of layer 0: placement[0][0]=0 on rank 0 and" in first[1]
    assert "Rank 1 cannot make placement 0 of layer 0: SpecError: placement has 2 experts" in first[2]
    assert second[2].startswith("SpecError: placement has 2 experts")


def reservations() -> list[str]:
    comm = join()
    spec = SPEC.replace(world_size=2)
    errors = [
        error_of(lambda: comm.reserve(spec.replace(max_tokens=128 + comm.rank))),
        error_of(lambda: comm.reserve(spec, spec.replace(world_size=3) if comm.rank else spec)),
    ]
    comm.reserve(spec, spec.replace(max_tokens=256))
    layer = layer_of(comm)
    call(layer)
    comm.reserve(spec)
    larger = fmg.MoELayer(spec.replace(max_tokens=256), comm=comm)
    assert call(larger) == call(layer)
    return [*errors, error_of(lambda: comm.reserve(spec.replace(max_tokens=257)))]


def test_other_reservations(told: Told) -> None:
    first, second = (rank["reservations"] for rank in told)
    assert first[0] == second[0] and "heap.max_tokens=128 on rank 0 and heap.max_tokens=129 on rank 1" in first[0]
    assert "Rank 1 cannot make reservation 0: SpecError: reserve() got world_size=3" in first[1]
    assert second[1].startswith("SpecError: reserve() got world_size=3")
    assert first[2] == second[2] and "max_tokens=257 (there is room for 256)" in first[2]


def unable() -> list[str]:
    comm = join()
    load = Fused.load
    if comm.rank == 1:

        def refuse(*_: Any) -> Any:
            raise fmg.CompileError("the compiler is missing", log="of many lines\nwith details")

        Fused.load = refuse  # type: ignore[method-assign]
    errors = [error_of(lambda: layer_of(comm))]
    Fused.load = load  # type: ignore[method-assign]
    errors.append(error_of(lambda: fmg.MoELayer(SPEC.replace(world_size=2 + comm.rank), comm=comm)))
    call(layer_of(comm))
    return errors


def test_a_rank_that_cannot_compile(told: Told) -> None:
    first, second = (rank["unable"] for rank in told)
    assert first[0] == "CommError: Rank 1 cannot make layer 0: CompileError: the compiler is missing."
    assert second[0].startswith("CompileError: the compiler is missing")
    assert "Rank 1 cannot make layer 0: CommError: comm has world_size=2, but the spec says 3" in first[1]


def slow() -> str:
    """A compiler that takes longer than the deadline of calls."""
    comm = join()
    timeout, os.environ["FLASHMOE_TIMEOUT_S"] = os.environ["FLASHMOE_TIMEOUT_S"], "0.5"
    time.sleep(1.5 * comm.rank)
    layer = layer_of(comm)
    os.environ["FLASHMOE_TIMEOUT_S"] = timeout
    return call(layer)


def test_a_slow_compiler_is_waited_for(told: Told) -> None:
    assert told[0]["slow"] and told[1]["slow"]


def out_of_step() -> list[str]:
    comm = join()
    errors = [error_of(comm.barrier if comm.rank else lambda: layer_of(comm))]
    comm.reset()
    errors.append(error_of((lambda: comm.split(0)) if comm.rank else comm.barrier))
    comm.reset()
    layers = [layer_of(comm) for _ in range(2)]
    before = [call(layer) for layer in layers]
    errors.append(error_of(lambda: call(layers[comm.rank])))
    errors.append(error_of(comm.check))
    comm.reset()
    comm.check()
    assert [call(layer) for layer in layers] == before
    return errors


def test_ranks_that_do_different_things(told: Told) -> None:
    for errors in (rank["out_of_step"] for rank in told):
        assert "is in the making of layer 0" in errors[0] and "is in barrier()" in errors[0]
        assert "is in barrier()" in errors[1] and "is in split()" in errors[1]
        for error in errors[2:]:
            assert "calls its layer 0 where rank" in error or "calls its layer 1 where rank" in error


# ---- When they start ----


STARTS = {
    "version": ("0", "CommError: The ranks disagree on how they start: version='0.1.0' on rank 0 and version='0' on rank 1."),
    "machine": ("x", "UnsupportedError: The ranks are on several machines (rank 0 on"),
    "heap_bytes": (1048576, "CommError: The ranks disagree on how they start: heap_bytes=None on rank 0 and heap_bytes=1048576"),
    "target": ("tpu", "CommError: Rank 1 cannot join: SpecError: FLASHMOE_TARGET='tpu' is not valid"),
}  # fmt: skip


def starting() -> list[str]:
    rank, errors = int(os.environ["RANK"]), []
    for name, (value, _) in STARTS.items():
        facts, patch = processes._Place.__init__, pytest.MonkeyPatch()

        def elsewhere(self: Any, *args: Any) -> None:
            facts(self, *args)  # noqa: B023
            self.facts[name] = value  # noqa: B023

        if rank == 1 and name == "target":
            patch.setenv("FLASHMOE_TARGET", str(value))
        elif rank == 1 and name != "heap_bytes":
            patch.setattr(processes._Place, "__init__", elsewhere)
        errors.append(error_of(lambda: join(value if rank == 1 and name == "heap_bytes" else None)))  # noqa: B023
        patch.undo()
    return errors


def test_processes_that_do_not_fit_together(told: Told) -> None:
    for (_, message), first, second in zip(STARTS.values(), told[0]["starting"], told[1]["starting"]):
        assert first.startswith(message)
        assert second == first or second.startswith("SpecError: FLASHMOE_TARGET='tpu'")


FACTS = {
    "error": "",
    "machine": "a",
    "host": "h",
    "version": "1",
    "method": "env",
    "world_size": 3,
    "target": "cuda",
    "heap_bytes": None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 2}, "world_size=3 on ranks 0, 2 and world_size=2 on rank 1"),
        ({"method": "mpi"}, "method='env' on ranks 0, 2 and method='mpi' on rank 1"),
        ({"target": "host", "gpu": ""}, "target='cuda' on ranks 0, 2 and target='host' on rank 1"),
        ({"gpu": "uuid2"}, "Ranks 1 and 2 are both on GPU uuid2. Each needs a GPU of its own"),
    ],
)
def test_what_ranks_say_of_themselves_is_compared(changes: dict[str, Any], message: str) -> None:
    facts = [{**FACTS, "gpu": f"uuid{rank}"} for rank in range(3)]
    processes._require_alike(facts)
    with pytest.raises(fmg.CommError, match=message):
        processes._require_alike([facts[0], facts[1] | changes, facts[2]])
