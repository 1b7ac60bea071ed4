"""In-process communicators."""

from __future__ import annotations

import pytest
from world import BOUNDS, Problem, World, on_ranks, relative_error, routes

import flashmoe_gen as fmg


def test_ranks_of_a_local_group() -> None:
    comms = fmg.comm.local_group(3)
    assert [(c.rank, c.world_size, c.local_rank) for c in comms] == [(r, 3, r) for r in range(3)]
    on_ranks(3, lambda rank: comms[rank].barrier())


@pytest.mark.parametrize("size", [0, 65, True, "2"])
def test_world_size_is_checked(size: object) -> None:
    with pytest.raises(fmg.SpecError, match="world_size="):
        fmg.comm.local_group(size)  # type: ignore[arg-type]


def test_single_process() -> None:
    with fmg.comm.init("single") as comm:
        assert (comm.rank, comm.world_size) == (0, 1)
    with pytest.raises(fmg.CommError, match="closed"):
        comm.barrier()


def test_unknown_method() -> None:
    with pytest.raises(fmg.SpecError, match="method='ucx'"):
        fmg.comm.init("ucx")  # type: ignore[arg-type]


@pytest.mark.parametrize("devices", [3, [0], [0, None], [0, True], [0, -1], [0, "1"]])
def test_devices_are_checked(devices: object) -> None:
    with pytest.raises(fmg.SpecError, match=r"devices=.* is not valid\. Must be None or the number of a GPU for each of the 2"):
        fmg.comm.local_group(2, devices=devices)  # type: ignore[arg-type]


@pytest.mark.parametrize("devices, sharing", [(None, [4] * 4), ([0, 1, 1, 1], [1, 3, 3, 3]), ([1, 0, 0, 1], [2] * 4)])
def test_parts_of_a_group_share_with_the_other_parts(devices: list[int] | None, sharing: list[int]) -> None:
    """Ranks of different parts run at the same time: were the whole processor theirs, none of their peers might find room."""
    comms = fmg.comm.local_group(4, devices=devices)
    assert [comm.sharing for comm in comms] == sharing
    halves = on_ranks(4, lambda rank: comms[rank].split(rank % 2))
    alone = on_ranks(4, lambda rank: halves[rank].split(halves[rank].rank))
    for parts in (halves, alone):
        assert [part.sharing for part in parts] == sharing
        assert [part.device for part in parts] == (devices or [None] * 4)
        assert all(part.lane is comm.lane for part, comm in zip(parts, comms))


def test_split_groups_run_a_layer_of_their_own() -> None:
    comms = fmg.comm.local_group(4)
    halves = on_ranks(4, lambda rank: comms[rank].split(color=rank % 2, key=-rank))
    assert [(c.rank, c.world_size) for c in halves] == [(1, 2), (1, 2), (0, 2), (0, 2)]
    spec = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=12, world_size=2)
    problem = Problem(spec)
    inputs = [(problem.tokens(12, rank), *routes(spec, 12, "uniform", rank)) for rank in range(2)]
    for color in range(2):
        members = sorted(halves[color::2], key=lambda c: c.rank)
        for y, (x, ids, weights) in zip(World(spec, comms=members).run(problem, inputs), inputs):
            assert relative_error(y, problem.reference(x, ids, weights)) <= BOUNDS["float32"]


SPEC = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=12, world_size=2)
LARGE = SPEC.replace(max_tokens=300)


def worlds_are_right(comms: list[fmg.comm.Communicator], *worlds: World) -> None:
    problem = Problem(SPEC)
    inputs = [(problem.tokens(12, rank), *routes(SPEC, 12, "uniform", rank)) for rank in range(2)]
    for world in worlds:
        for y, case in zip(world.run(problem, inputs), inputs):
            assert relative_error(y, problem.reference(*case)) <= BOUNDS["float32"]


def test_a_larger_layer_grows_the_heap_before_the_first_call() -> None:
    comms = fmg.comm.local_group(2)
    small = World(SPEC, comms=comms)
    before = comms[0].heap.bytes
    large = World(LARGE, comms=comms)
    assert comms[0].heap.bytes > before
    worlds_are_right(comms, small, large, small, small, large)


def test_the_heap_stays_where_it_is_after_the_first_call() -> None:
    comms = fmg.comm.local_group(2)
    small = World(SPEC, comms=comms)
    worlds_are_right(comms, small)
    where = comms[0].heap_pointers()
    smaller = World(SPEC.replace(max_tokens=6), comms=comms)
    message = r"max_tokens=300 \(there is room for 12\).*comm.reserve\(\*specs\).*heap_bytes="
    with pytest.raises(fmg.CommError, match=message):
        World(LARGE, comms=comms)
    for comm in comms:
        with pytest.raises(fmg.CommError, match=message):
            comm.reserve(LARGE)
    for comm in comms:
        comm.reserve(SPEC)
    assert comms[0].heap_pointers() == where
    worlds_are_right(comms, small)
    assert smaller.layers[0].comm.heap_pointers() == where


def test_reserve_makes_room_for_what_comes_later() -> None:
    comms = fmg.comm.local_group(2)
    for comm in comms:
        comm.reserve(SPEC, LARGE)
    small = World(SPEC, comms=comms)
    worlds_are_right(comms, small)
    where = comms[0].heap_pointers()
    worlds_are_right(comms, World(LARGE, comms=comms), small)
    assert comms[0].heap_pointers() == where


def test_a_heap_of_a_given_size_is_filled() -> None:
    comms = fmg.comm.local_group(2, heap_bytes=4 << 20)
    small = World(SPEC, comms=comms)
    worlds_are_right(comms, small)
    assert 2 << 20 < comms[0].heap.bytes <= 4 << 20
    worlds_are_right(comms, World(LARGE, comms=comms), small)
    with pytest.raises(fmg.CommError, match="max_tokens=100000"):
        World(SPEC.replace(max_tokens=100_000), comms=comms)


def test_what_is_reserved_is_checked_and_compared() -> None:
    first, second = fmg.comm.local_group(2)
    for wrong, message in ((12, "got a int"), (SPEC.replace(world_size=3), "world_size=3. Must be 2")):
        with pytest.raises(fmg.SpecError, match=message):
            first.reserve(wrong)  # type: ignore[arg-type]
    first.reserve(SPEC)
    with pytest.raises(fmg.CommError, match=r"disagree on reservation 0: heap.max_tokens=12 on rank 0 and .*=300 on rank 1"):
        second.reserve(LARGE)
