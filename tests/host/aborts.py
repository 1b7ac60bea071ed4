"""Calls that must fail, and how: what is wrong with the way they fail, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scenarios import Scenario
from world import poison

from flashmoe_gen.args import AWAIT, CONTROL, OVERLAP, TAG
from flashmoe_gen.launch.explore import explore
from flashmoe_gen.launch.host import HostKernel

Kernels = dict[int, HostKernel] | None
Replace = Callable[[Scenario], Kernels]  # a planted bug in the kernels of a scenario, or none
_RETURNS = list(AWAIT.members).index("returns")


def _records(scenario: Scenario) -> list[Any]:
    return [comm.record[0] for comm in scenario.worlds[0][0].comms]


def _right_or_nan(y: np.ndarray, want: np.ndarray) -> bool:
    there = ~np.isnan(y).any(1)
    return bool(np.allclose(y[there], want[there], rtol=1e-4, atol=1e-5))


def different_calls(replace: Replace, seeds: int = 12) -> str | None:
    """Two ranks call their two layers in opposite order."""
    scenario = Scenario(2, combine="route", counts=[[7, 9], [5, 4]], hidden=(16, 32))
    scenario.calls[1].reverse()
    for seed in range(seeds):
        scenario.reset()
        scenario.run(seed, kernels=replace(scenario))
        for rank, record in enumerate(_records(scenario)):
            if not record["filled"] or record["what"] != TAG:
                return f"seed {seed}: rank {rank} has {record}"
            if {int(record["expected"]) >> 16, int(record["seen"]) >> 16} != {0, 1}:
                return f"seed {seed}: rank {rank} names other layers: {record}"
        if not all(np.isnan(call.y).all() for per_rank in scenario.calls for call in per_rank):
            return f"seed {seed}: there is output"
    return None


def peers_of_a_rank_that_gives_up(replace: Replace, seeds: int = 8) -> str | None:
    """A word for rank 0 is lost; the others would wait for rank 0 in their next call."""
    scenario = Scenario(3, combine="route", counts=[[3, 3], [4, 4], [5, 5]], slots=[[], [0, 1, 2], [3, 4]])
    comm = scenario.worlds[0][0].comms[0]
    scenario.patience = {1: 20, 2: 20}
    word = comm.heap_memory(0).pointer + comm.heap.regions["return_signals"].offset
    for seed in range(seeds):
        scenario.reset()
        scenario.calls[0][0].inputs[1][:] = [[0, 1]] * 3
        scenario.run(seed, kernels=replace(scenario), lost_word=word)
        for rank, record in enumerate(_records(scenario)):
            if not record["filled"] or (record["rank"], record["what"]) != (0, _RETURNS):
                return f"seed {seed}: rank {rank} has {record}"
    return None


def launches_at_once(replace: Replace, seeds: int = 60) -> str | None:
    """Two launches of one rank, each as it would be alone: either one comes after the other, or both are known to be wrong."""
    scenario = Scenario(1, combine="route", counts=[[9, 30]], processors=3)
    (first, second), comm = scenario.calls[0], scenario.worlds[0][0].comms[0]
    heap, overlapped = comm.heap_memory(0), 0
    for seed in range(seeds):
        scenario.reset()
        poison(first.layer)
        launches = []
        for call in (first, second):
            call.y[:] = np.nan
            packed = call.layer._placed.pack(*call.inputs, call.experts, call.y, None)
            kernel = (replace(scenario) or {}).get(16, call.layer._fused.kernel)
            launches.append([(kernel, packed.prepared.args.copy())])
        explore(launches, [heap, heap], threads=scenario.threads, seed=seed)
        record = comm.record[0]
        aborted = heap.array[: CONTROL.size].view(CONTROL.dtype)["aborted"][0]
        if not record["filled"]:
            if aborted or (wrong := scenario.wrong()):
                return f"seed {seed}: aborted {aborted}, no record; {wrong}"
        elif record["what"] != OVERLAP:
            return f"seed {seed}: {record}"
        elif wrong := [n for n, call in enumerate((first, second)) if not _right_or_nan(call.y, call.want)]:
            return f"seed {seed}: other rows than right ones and NaN in {wrong}"
        else:
            overlapped += 1
    return None if overlapped else "the launches never met"


CHECKS = {
    "different calls": different_calls,
    "peers of a rank that gives up": peers_of_a_rank_that_gives_up,
    "launches at once": launches_at_once,
}
