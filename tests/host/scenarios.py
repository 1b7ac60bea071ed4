"""Sequences of calls on several ranks that the explorer and the race test run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from world import BOUNDS, Problem, World, poison, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.args import CONTROL
from flashmoe_gen.launch.explore import explore
from flashmoe_gen.launch.host import HostKernel

KINDS = ("uniform", "skewed", "one", "few", "masked", "none")


@dataclass
class Call:
    """One call of one rank: which layer, its inputs, and what must come out."""

    layer: fmg.MoELayer
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    experts: fmg.Experts
    want: np.ndarray
    y: np.ndarray


class Scenario:
    """Calls with changing counts and routings, alternating between layers that share one heap."""

    def __init__(
        self,
        world_size: int,
        *,
        combine: str,
        counts: list[list[int]],
        hidden: tuple[int, ...] = (16,),
        slots: list[list[int]] | None = None,
        experts: int = 5,
        capacity: int | None = None,
        processors: int = 2,
        ring: int | None = None,
        panel: int = 1,
        cluster: int = 1,
        pool: int | None = None,
        epoch: int = 0,
        seed: int = 0,
    ) -> None:
        """``pool``: rows that can wait to be summed, fewer than there is room for; ``epoch``: calls the heap has seen before."""
        self.world_size, self.pool, self.epoch = world_size, pool, epoch
        self.patience: dict[int, int] = {}  # of ranks whose deadline is later, times so much
        self.threads = processors + 2
        comms = fmg.comm.local_group(world_size)
        placement = fmg.Placement(slots) if slots else None
        self.worlds: list[tuple[World, Problem]] = []
        for size in hidden:
            spec = fmg.MoESpec(
                size, 24, experts, 2, dtype="float32", max_tokens=40, world_size=world_size, capacity=capacity
            )
            tile = fmg.TileConfig(block_m=4, block_n=8, cluster=cluster)
            schedule = fmg.Schedule(combine=combine, lag=1, panel=panel, ring=ring)
            world = World(spec, tile=tile, schedule=schedule, placement=placement, processors=processors, comms=comms)
            self.worlds.append((world, Problem(spec, seed)))
        self.calls = [
            [self._call(rank, n, count, seed) for n, count in enumerate(per_rank)] for rank, per_rank in enumerate(counts)
        ]

    def _call(self, rank: int, n: int, count: int, seed: int) -> Call:
        world, problem = self.worlds[n % len(self.worlds)]
        x = problem.tokens(count, 100 * n + rank)
        ids, weights = routes(problem.spec, count, KINDS[(n + rank + seed) % len(KINDS)], 31 * n + rank + seed)
        want = problem.reference(x, ids, weights)
        experts = problem.experts(world.placement.local_experts(rank))
        return Call(world.layers[rank], (x, ids, weights), experts, want, np.empty_like(x))

    def run(self, seed: int, *, kernels: dict[int, HostKernel] | None = None, lost_word: int | None = None) -> int:
        """Explore one interleaving from freshly poisoned memory; returns the steps taken."""
        if self.epoch:  # words of the run before would name the same calls
            self.reset()
        for world, _ in self.worlds:
            for layer in world.layers:
                poison(layer)
        launches: list[list[tuple[HostKernel, Any]]] = []
        for rank, per_rank in enumerate(self.calls):
            launches.append([])
            for call in per_rank:
                call.y[:] = np.nan
                packed = call.layer._placed.pack(*call.inputs, call.experts, call.y, None)
                kernel = (kernels or {}).get(call.layer.spec.hidden_size, call.layer._fused.kernel)
                args = packed.prepared.args.copy()
                if self.pool is not None:
                    args["pool_rows"] = self.pool
                args["timeout_ns"] *= self.patience.get(rank, 1)
                launches[-1].append((kernel, args))
        comm = self.worlds[0][0].comms[0]
        heaps = [comm.heap_memory(rank) for rank in range(self.world_size)]
        if self.epoch:
            for heap in heaps:
                heap.array[: CONTROL.size].view(CONTROL.dtype)["epoch"] = self.epoch
        return explore(launches, heaps, threads=self.threads, seed=seed, lost_word=lost_word)

    def wrong(self) -> str | None:
        """What is wrong with the outputs of the last run, or None."""
        for rank, per_rank in enumerate(self.calls):
            for n, call in enumerate(per_rank):
                error = relative_error(call.y, call.want)
                if not error <= BOUNDS["float32"]:
                    return f"rank {rank}, call {n}: relative error {error}"
        return None

    def reset(self) -> None:
        """Start afresh after a failed run (all ranks at once: nothing is in flight)."""
        self.worlds[0][0].comms[0]._transport.clear()


def standard() -> list[Scenario]:
    """World sizes 1 to 4, both combine modes, idle ranks, ranks without experts, two layers of different H on one heap, a pool
    that is too small for all sources, and the turn of the epoch."""
    changing = [[7, 0, 33, 1, 16], [0, 20, 1, 17, 5], [40, 0, 0, 9, 2], [3, 3, 38, 0, 0]]
    return [
        Scenario(1, combine="route", counts=changing[:1], hidden=(16, 32), processors=3, panel=4),
        Scenario(2, combine="route", counts=changing[:2], hidden=(16, 32), ring=2),
        Scenario(2, combine="rank", counts=changing[:2], panel=3, seed=1),
        Scenario(3, combine="route", counts=changing[:3], slots=[[3, 1, 0, 2, 4], [], []], ring=1),
        Scenario(3, combine="rank", counts=changing[:3], slots=[[], [4, 0], [1, 2, 3]], hidden=(32, 16), seed=2),
        Scenario(4, combine="rank", counts=changing, capacity=6, processors=1, seed=3),
        Scenario(4, combine="route", counts=changing, capacity=3, panel=2, seed=4),
        Scenario(2, combine="route", counts=changing[:2], processors=3, panel=3, cluster=2, seed=5),
        Scenario(4, combine="rank", counts=changing, pool=30, ring=2, seed=6),
        Scenario(3, combine="rank", counts=changing[:3], hidden=(16, 32), epoch=2**32 - 3, seed=7),
    ]
