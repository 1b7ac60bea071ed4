"""What layers of a communicator share: one heap, one scratch; and layers without a communicator, which share one."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from world import BOUNDS, Problem, World, relative_error, routes

import flashmoe_gen as fmg

SPEC = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=40)


def right(layer: fmg.MoELayer, count: int, seed: int) -> None:
    problem = Problem(layer.spec)
    case = problem.tokens(count, seed), *routes(layer.spec, count, "uniform", seed)
    y = layer(*case, problem.experts(range(layer.spec.num_experts)))
    assert relative_error(y, problem.reference(*case)) <= BOUNDS["float32"]


def test_layers_without_a_communicator_share_heap_and_scratch() -> None:
    layers = [fmg.MoELayer(SPEC, target="host") for _ in range(48)]
    comm = layers[0].comm
    assert all(layer.comm is comm for layer in layers)
    assert comm.scratches.bytes == layers[0]._placed.scratch.memory.nbytes
    own = sum(layer.workspace_bytes for layer in layers)
    assert own < 48 * 1024, "each has its counts and its tables, no more"
    for n, layer in enumerate(layers[:6]):
        right(layer, 40 - n, n)
    assert layers[0].stats().calls == 1


def test_a_layer_that_does_not_fit_gets_another_one() -> None:
    small, large = (fmg.MoELayer(SPEC.replace(max_tokens=count), target="host") for count in (40, 400))
    assert small.comm is not large.comm
    again = fmg.MoELayer(SPEC.replace(max_tokens=300), target="host")
    assert again.comm is large.comm
    for layer, count in ((small, 40), (large, 400), (again, 300), (small, 7)):
        right(layer, count, count)


def test_a_failed_or_closed_one_is_not_shared() -> None:
    first = fmg.MoELayer(SPEC, target="host")
    first.comm.close()
    second = fmg.MoELayer(SPEC, target="host")
    assert second.comm is not first.comm
    right(second, 9, 1)


def test_what_is_shared_goes_with_the_last_layer() -> None:
    comm = fmg.comm.init("single")
    layers = [fmg.MoELayer(SPEC, target="host", comm=comm) for _ in range(2)]
    held = comm.scratches.bytes
    layers[0].close()
    assert comm.scratches.bytes == held > 0
    layers[1].close()
    gc.collect()
    assert comm.scratches.bytes == 0


@pytest.mark.parametrize("combine", ["route", "rank"])
def test_layers_of_other_sizes_leave_nothing_behind_for_each_other(combine: str) -> None:
    """Their counter sets are of different length: each clears what the one before may have changed."""
    comms = fmg.comm.local_group(2)
    specs = [SPEC.replace(world_size=2, max_tokens=count, num_experts=experts) for count, experts in ((300, 64), (40, 5))]
    worlds = [World(spec, comms=comms, schedule=fmg.Schedule(combine=combine)) for spec in specs]
    assert len(list(comms[0].scratches)) == 1
    for n in (0, 1, 0, 0, 1, 1, 0, 1):
        world, spec = worlds[n], specs[n]
        problem = Problem(spec)
        inputs = [(problem.tokens(c, n), *routes(spec, c, "uniform", c)) for c in (spec.max_tokens, 17)]
        for y, case in zip(world.run(problem, inputs), inputs):
            assert relative_error(y, problem.reference(*case)) <= BOUNDS["float32"]
            assert np.isfinite(y).all()


def test_what_a_layer_that_is_gone_has_left_is_cleared_with_the_rest() -> None:
    """A scratch may outlive its layer, in the traceback of an interrupted call, and serve the next one."""
    comm = fmg.comm.init("single")
    first = fmg.MoELayer(SPEC, target="host", comm=comm)
    right(first, 20, 1)
    scratch = first._placed.scratch
    for region in scratch.needs.counters.values():
        scratch.memory.fill(region.offset, region.bytes, 0xFF)
    del first
    gc.collect()
    comm.reset()
    second = fmg.MoELayer(SPEC, target="host", comm=comm)
    assert second._placed.scratch is scratch
    right(second, 20, 2)
