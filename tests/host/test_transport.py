"""Communicators and layers ask nothing of a transport but what the protocol says, and ranks may have devices of their own."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from world import BOUNDS, Problem, World, on_ranks, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.comm.base import Transport
from flashmoe_gen.comm.local import LocalGroup, LocalTransport
from flashmoe_gen.launch.host import HostMemory, HostTarget

SPEC = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=12, world_size=2)
PROBLEM = Problem(SPEC)
INPUTS = [(PROBLEM.tokens(12, rank), *routes(SPEC, 12, "uniform", rank)) for rank in range(2)]
MEMBERS = {name for name in dir(Transport) if not name.startswith("_")} | set(Transport.__annotations__)


class Recorded:
    """Passes on what the protocol names, and no more; values of an exchange must be such as go from process to process."""

    def __init__(self, inner: Any, used: Counter[str]) -> None:
        self._inner, self._used = inner, used

    def __getattr__(self, name: str) -> Any:
        assert name in MEMBERS, f"{name} is not in the protocol"
        self._used[name] += 1
        return getattr(self._inner, name)

    def exchange(self, value: Any, what: str) -> list[Any]:
        for part in value if isinstance(value, tuple) else (value,):
            assert part is None or isinstance(part, (int, str)), part
        self._used["exchange"] += 1
        return self._inner.exchange(value, what)

    def split(self, members: list[int]) -> Recorded:
        self._used["split"] += 1
        return Recorded(self._inner.split(members), self._used)


def recorded(world_size: int) -> tuple[list[fmg.comm.Communicator], Counter[str]]:
    group, used = LocalGroup(world_size, None), Counter[str]()
    return [fmg.comm.Communicator(Recorded(LocalTransport(group, rank), used)) for rank in range(world_size)], used


def assert_right(ys: list[np.ndarray]) -> None:
    for y, case in zip(ys, INPUTS):
        assert relative_error(y, PROBLEM.reference(*case)) <= BOUNDS["float32"]


def test_the_protocol_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, errors that peers are told, collectives, and a layer on a part of the ranks; every member is used."""
    comms, used = recorded(2)
    world = World(SPEC, comms=comms)
    assert_right(world.run(PROBLEM, INPUTS))

    def one_refuses(rank: int) -> None:
        x, ids, weights = INPUTS[rank]
        experts = PROBLEM.experts(world.placement.local_experts(rank))
        with pytest.raises(fmg.SpecError if rank else fmg.CommError, match="x has shape"):
            world.layers[rank](x[:, :-1] if rank else x, ids, weights, experts)

    on_ranks(2, one_refuses)
    on_ranks(2, lambda rank: comms[rank].reset())
    with monkeypatch.context() as patch:
        patch.setenv("FLASHMOE_TIMEOUT_S", "0.2")
        with pytest.raises(fmg.KernelTimeoutError, match="of rank 1"):
            world.layers[0](*INPUTS[0], PROBLEM.experts(world.placement.local_experts(0)))
    on_ranks(2, lambda rank: comms[rank].reset())
    assert_right(world.run(PROBLEM, INPUTS))
    on_ranks(2, lambda rank: comms[rank].barrier())
    assert comms[0].target == "host"
    halves = on_ranks(2, lambda rank: comms[rank].split(0))

    def one_is_late(rank: int) -> np.ndarray:
        time.sleep(0.2 * rank)
        layer = fmg.MoELayer(SPEC, target="host", comm=halves[rank])
        return layer(*INPUTS[rank], PROBLEM.experts(layer.placement.local_experts(rank)))

    assert_right(on_ranks(2, one_is_late))
    comms[1].close()
    with pytest.raises(fmg.CommError, match="closed"):
        comms[0].barrier()
    assert MEMBERS - set(used) == set()


def test_a_communicator_says_which_ranks_are_here() -> None:
    assert [comm.ranks_here for comm in fmg.comm.local_group(3)] == [(0, 1, 2)] * 3
    assert fmg.comm.init("single").ranks_here == (0,)


class Device(HostTarget):
    """The CPU under another name, which can use the memory of some others."""

    def __init__(self, number: int, reached: tuple[int, ...]) -> None:
        self.device = f"cpu:{number}"
        self.reached = {self.device, *(f"cpu:{other}" for other in reached)}
        self.allocated: list[HostMemory] = []
        self.aborted: list[int] = []

    def reaches(self, other: Any) -> str:
        return "" if other.device in self.reached else f"{self.device} cannot use the memory of {other.device}."

    def allocate(self, nbytes: int) -> HostMemory:
        self.allocated.append(super().allocate(nbytes))
        return self.allocated[-1]

    def interrupt(self, aborted: Any) -> None:
        self.aborted += aborted


def reserve(comm: fmg.comm.Communicator, device: Device) -> None:
    """As a layer does."""
    comm.bind(device)  # type: ignore[arg-type]
    comm.reserve(SPEC.replace(world_size=comm.world_size))


def test_each_rank_has_its_heap_where_it_runs() -> None:
    comms = fmg.comm.local_group(2)
    devices = [Device(0, (1,)), Device(1, (0,))]
    for comm, device in zip(comms, devices):
        reserve(comm, device)
    for comm, device in zip(comms, devices):
        assert comm.heap_memory(comm.rank) is device.allocated[-1]
        assert comm.heap_pointers() == [other.allocated[-1].pointer for other in devices]
    generation = comms[0].generation
    reserve(comms[0], devices[0])
    assert comms[0].generation == generation  # nothing moves again
    comms[0].close(abort=True)
    for device in devices:  # each rank's word is set by the target of that rank
        (address,) = device.aborted
        assert 0 <= address - device.allocated[-1].pointer < device.allocated[-1].nbytes


@pytest.mark.parametrize("reached", [((), ()), ((1,), ()), ((), (0,))])
def test_ranks_whose_devices_do_not_reach_each_other_are_refused(reached: tuple[tuple[int, ...], ...]) -> None:
    """Both ways: each rank writes into the memory of the other."""
    comms = fmg.comm.local_group(2)
    reserve(comms[0], Device(0, reached[0]))
    with pytest.raises(fmg.CommError, match="cannot use the memory of"):
        reserve(comms[1], Device(1, reached[1]))


def test_a_rank_stays_on_its_device() -> None:
    comm = fmg.comm.init("single")
    reserve(comm, Device(0, (1,)))
    with pytest.raises(fmg.CommError, match="layers run on cpu:0; this one would run on cpu:1"):
        reserve(comm, Device(1, (0,)))


def test_launches_of_a_rank_follow_each_other_across_its_communicators() -> None:
    comms = fmg.comm.local_group(2)
    halves = on_ranks(2, lambda rank: comms[rank].split(0))
    assert [half.lane for half in halves] == [comm.lane for comm in comms]
    assert comms[0].lane is not comms[1].lane
