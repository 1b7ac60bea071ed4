"""In-process communicators."""

from __future__ import annotations

import numpy as np
import pytest
from world import BOUNDS, Problem, World, on_ranks, relative_error, routes

import flashmoe_gen as fmg


def test_ranks_of_a_local_group() -> None:
    comms = fmg.comm.local_group(3)
    assert [(c.rank, c.world_size, c.local_rank) for c in comms] == [(r, 3, r) for r in range(3)]
    on_ranks(3, lambda rank: comms[rank].barrier())


@pytest.mark.parametrize("size", [0, 9, True, "2"])
def test_world_size_is_checked(size: object) -> None:
    with pytest.raises(fmg.SpecError, match="world_size="):
        fmg.comm.local_group(size)  # type: ignore[arg-type]


def test_single_process() -> None:
    with fmg.comm.init("single") as comm:
        assert (comm.rank, comm.world_size) == (0, 1)
    with pytest.raises(fmg.CommError, match="closed"):
        comm.barrier()


@pytest.mark.parametrize("method", ["mpi", "torch", "slurm"])
def test_several_processes_are_not_supported_yet(method: str) -> None:
    with pytest.raises(fmg.UnsupportedError, match=f"method='{method}'.*local_group"):
        fmg.comm.init(method)  # type: ignore[arg-type]


def test_auto_does_not_ignore_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(fmg.UnsupportedError, match="WORLD_SIZE=4"):
        fmg.comm.init()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fmg.comm.init().world_size == 1


def test_unknown_method() -> None:
    with pytest.raises(fmg.SpecError, match="method='ucx'"):
        fmg.comm.init("ucx")  # type: ignore[arg-type]


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


def test_a_larger_layer_grows_the_heap_between_calls() -> None:
    comms = fmg.comm.local_group(2)
    spec = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=12, world_size=2)
    problem = Problem(spec)
    inputs = [(problem.tokens(12, rank), *routes(spec, 12, "uniform", rank)) for rank in range(2)]
    small = World(spec, comms=comms)
    want = [problem.reference(*case) for case in inputs]
    for _ in range(3):
        small.run(problem, inputs)
    before = comms[0].heap.bytes
    large = World(spec.replace(max_tokens=300), comms=comms)
    assert comms[0].heap.bytes > before
    for world in (large, small, small, large, small):
        for y, expected in zip(world.run(problem, inputs), want):
            assert relative_error(y, expected) <= BOUNDS["float32"]
    assert np.isfinite(want[0]).all()
