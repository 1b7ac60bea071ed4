"""Groups inside a larger job: each with its own heap, words and failures."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from group import Group, error_of, join
from work import SPEC, call, digest, inputs_of, layer_of
from world import Problem, World

import flashmoe_gen as fmg

Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What four ranks returned of the functions below."""
    work = "halves alternating uneven failing opposite"
    return Group(tmp_path_factory.mktemp("split"), __name__, work, 4, FLASHMOE_TIMEOUT_S="30").results()


def halves() -> dict[str, Any]:
    comm = join()
    half = comm.split(color=comm.rank % 2, key=-comm.rank)
    with layer_of(half) as layer:
        y = call(layer)
    facts = {name: getattr(half, name) for name in ("rank", "world_size", "node", "ranks_here")}
    half.close()
    comm.barrier()  # this one goes on
    comm.close()
    return {**facts, "y": y}


def test_halves_run_layers_of_their_own(told: Told) -> None:
    """Each rank gets the bits of a local group of two."""
    spec = SPEC.replace(world_size=2)
    want = World(spec).run(Problem(spec), [inputs_of(spec, rank, 64) for rank in range(2)])
    for rank, results in enumerate(told):
        found, number = results["halves"], 1 - rank // 2
        assert found.pop("y") == digest(want[number])
        assert found == {"rank": number, "world_size": 2, "node": 0, "ranks_here": [number]}


def alternating() -> bool:
    """A layer of the job and one of each half, in turns, with a group of one rank each as well."""
    comm = join()
    half, own = comm.split(comm.rank // 2), comm.split(comm.rank)
    assert half.lane is comm.lane and own.lane is comm.lane
    layers = [layer_of(group) for group in (comm, half, own)]
    before = [call(layer) for layer in layers]
    for n in range(20):
        assert call(layers[n % 3]) == before[n % 3]
    assert len({group.heap_pointers()[group.rank] for group in (comm, half, own)}) == 3
    comm.barrier()
    return True


def test_groups_in_turns(told: Told) -> None:
    assert all(results["alternating"] for results in told)


def uneven() -> list[int]:
    comm = join()
    part = comm.split(min(comm.rank, 1))
    placement = fmg.Placement([[0], [7, 6, 5, 4, 3, 2, 1], []]) if part.world_size == 3 else None
    call(layer_of(part, placement=placement))
    again = comm.split(0)
    part.close()
    return [part.rank, part.world_size, again.rank, again.world_size, call(layer_of(again)) != ""]


def test_uneven_groups(told: Told) -> None:
    assert [results["uneven"] for results in told] == [[0, 1, 0, 4, 1], *([n, 3, n + 1, 4, 1] for n in range(3))]


def failing() -> list[str]:
    """A group fails and is reset; the others, and the job, do not notice."""
    comm = join()
    half = comm.split(comm.rank // 2)
    layers = [layer_of(comm), layer_of(half)]
    before = [call(layer) for layer in layers]
    x, ids, weights = inputs_of(layers[1].spec, half.rank, 64)
    bad = (x[:, :-1], ids, weights) if comm.rank == 1 else None
    error = error_of(lambda: call(layers[1], bad))
    assert call(layers[0]) == before[0]
    if comm.rank < 2:
        half.reset()
    assert [call(layer) for layer in layers] == before
    comm.barrier()
    return [error, error_of(lambda: comm.split("a"))]  # type: ignore[arg-type]


def test_a_group_fails_alone(told: Told) -> None:
    errors = [results["failing"][0] for results in told]
    assert "Rank 1 raised SpecError: x has shape" in errors[0] and errors[1].startswith("SpecError: x has shape")
    assert errors[2:] == ["", ""]
    assert told[0]["failing"][1].startswith("SpecError: color='a' is not valid")


def opposite() -> list[Any]:
    """Two groups of the same ranks, called in opposite order: ends by the deadline, and says what each waited for."""
    comm = join()
    groups = [comm.split(comm.rank // 2) for _ in range(2)]
    layers = [layer_of(group) for group in groups]
    before = [call(layer) for layer in layers]
    os.environ["FLASHMOE_TIMEOUT_S"] = "1"
    start = time.monotonic()
    error = error_of(lambda: call(layers[comm.rank % 2]))
    os.environ["FLASHMOE_TIMEOUT_S"] = "30"
    seconds = time.monotonic() - start
    comm.barrier()
    for group in groups:
        group.reset()
    assert [call(layer) for layer in layers] == before
    return [error, seconds]


def test_groups_in_opposite_order(told: Told) -> None:
    for results in told:
        error, seconds = results["opposite"]
        assert error.startswith("KernelTimeoutError: rank ") and "of rank " in error and seconds < 20


def gone() -> list[str]:
    comm = join()
    call(layer_of(comm.split(0)))
    if comm.rank == 1:
        comm.close()
        return []
    return [error_of(comm.barrier), error_of(lambda: comm.split(0))]


def test_a_rank_that_has_closed_takes_no_part(tmp_path: Path) -> None:
    first, second = Group(tmp_path, __name__, "gone", 2).results()
    assert second == []
    assert all("rank 1 has closed its communicator" in error for error in first)
