"""Heaps and calls of processes that share memory."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group import Group, error_of, join, say
from work import SPEC, call, digest, inputs_of, layer_of
from world import Problem, World

import flashmoe_gen as fmg
from flashmoe_gen.comm import shared
from flashmoe_gen.comm.shared import Process, SharedMemory

COUNTS = (64, 0, 17)
MIB = 1 << 20


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks returned of the functions below."""
    return Group(tmp_path_factory.mktemp("shared"), __name__, "calls growing filled too_large", 2).results()


def calls() -> list[str]:
    with join() as comm, layer_of(comm) as layer:
        return [call(layer, count=COUNTS[(n + comm.rank) % 3]) for n in range(12)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three ranks returned."""
    return Group(tmp_path_factory.mktemp("three"), __name__, "calls facts impatient", 3).results()


@pytest.mark.parametrize("ranks", ["told", "three"])
def test_calls_have_the_bits_of_a_local_group(request: pytest.FixtureRequest, ranks: str) -> None:
    results = request.getfixturevalue(ranks)
    world_size = len(results)
    spec = SPEC.replace(world_size=world_size)
    world, problem = World(spec), Problem(spec)
    want = [
        world.run(problem, [inputs_of(spec, rank, COUNTS[(n + rank) % 3]) for rank in range(world_size)])
        for n in range(3)
    ]
    for rank, got in enumerate(results):
        assert got["calls"] == [digest(want[n % 3][rank]) for n in range(12)]


def facts() -> dict[str, Any]:
    comm = join()
    found = {name: getattr(comm, name) for name in ("rank", "world_size", "local_rank", "node", "sharing", "target")}
    found["names"] = comm._transport.exchange(("rank", comm.rank, None, 0.5), "names()")
    long = "x" * 100_000 * comm.rank
    found["lengths"] = [len(text) for text in comm._transport.exchange(long, "long()")]
    for _ in range(300):
        comm.barrier()
    comm.close()
    comm.close()
    found["closed"] = error_of(comm.barrier)
    return found


def test_what_a_rank_knows_and_exchanges(three: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(three):
        assert found["facts"] == {
            "rank": rank,
            "world_size": 3,
            "local_rank": rank,
            "node": 0,
            "sharing": 3,
            "target": "host",
            "names": [["rank", peer, None, 0.5] for peer in range(3)],
            "lengths": [0, 100_000, 200_000],
            "closed": "CommError: The communicator is closed.",
        }


def impatient() -> list[Any]:
    """Exchanges with deadlines so short that many ranks leave, and come again, at every moment of them."""
    comm, draw = join(), random.Random(os.getpid())
    board = comm._transport._board  # type: ignore[attr-defined]
    left = done = 0
    seen = hashlib.sha256()
    end = time.monotonic() + 2
    while True:
        going = time.monotonic() < end
        try:
            limit = draw.choice((1e-6, 1e-4, 1e-3, 5e-3))
            told = board.exchange((done, left, going), "impatient()", limit, lambda: None)
        except fmg.CommError as error:
            assert "did not come within" in str(error)
            left += 1
            continue
        seen.update(repr(told).encode())
        assert [number for number, _, _ in told] == 3 * [done]
        done += 1
        if not any(going for _, _, going in told):
            return [done, left, seen.hexdigest()]
        time.sleep(draw.choice((0, 0, 1e-3)))


def test_ranks_that_leave_an_exchange_were_not_in_it(three: list[dict[str, Any]]) -> None:
    """All see the same: nobody has seen what a rank brought before it left."""
    assert len({(done, seen) for done, _, seen in (rank["impatient"] for rank in three)}) == 1
    assert all(done > 20 and left > 20 for done, left, _ in (rank["impatient"] for rank in three))


def growing() -> list[Any]:
    """Before the first call a layer may need more, afterwards not."""
    comm = join()
    small = layer_of(comm)
    larger = fmg.MoELayer(small.spec.replace(max_tokens=100), comm=comm)
    where = comm.heap_pointers()
    results = [call(small), call(larger), call(small)]
    error = error_of(lambda: fmg.MoELayer(small.spec.replace(max_tokens=300), comm=comm))
    assert comm.heap_pointers() == where
    return [*results, call(small), error]


def test_the_heap_grows_until_the_first_call(told: list[dict[str, Any]]) -> None:
    for first, second, third, fourth, error in (rank["growing"] for rank in told):
        assert first == second == third == fourth
        assert "max_tokens=300 (there is room for 100)" in error and "comm.reserve(*specs)" in error


def filled() -> list[Any]:
    comm = join(heap_bytes=8 * MIB)
    before = comm.heap_pointers()
    comm.reserve(SPEC.replace(world_size=2))
    layers = [layer_of(comm), fmg.MoELayer(SPEC.replace(world_size=2, max_tokens=500), comm=comm)]
    assert comm.heap_pointers() == before and 7 * MIB < comm.heap.bytes <= 8 * MIB
    assert call(layers[0]) == call(layers[1])
    return [error_of(lambda: fmg.MoELayer(SPEC.replace(world_size=2, max_tokens=50_000), comm=comm)), call(layers[0])]


def test_a_heap_of_a_given_size_is_there_from_the_start(told: list[dict[str, Any]]) -> None:
    for error, _ in (rank["filled"] for rank in told):
        assert "max_tokens=50000 (there is room for" in error


def too_large() -> str:
    return error_of(lambda: join(heap_bytes=1 << 50))


def test_memory_that_is_not_there_is_an_error_on_all_ranks(told: list[dict[str, Any]]) -> None:
    for error in (rank["too_large"] for rank in told):
        assert error.startswith(f"CommError: This machine has no {2 << 50} bytes of memory left to share")


# ---- The memory itself ----


def test_memory_is_opened_by_its_number_and_known_by_its_content() -> None:
    memory = SharedMemory.make(1000)
    memory.array[:3] = 1, 2, 3
    code = f"""
from flashmoe_gen.comm.shared import SharedMemory
memory = SharedMemory.open({memory.handle!r})
assert memory.array[:4].tolist() == [1, 2, 3, 0]
memory.array[3] = 4
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert memory.array[:4].tolist() == [1, 2, 3, 4]
    pid, number, nonce, nbytes = memory.handle
    with pytest.raises(fmg.CommError, match="is that of another one"):
        SharedMemory.open((pid, number, nonce[::-1], nbytes))
    with pytest.raises(OSError):
        os.ftruncate(number, 1)
    handle = memory.handle
    del memory
    with pytest.raises(fmg.CommError, match="cannot be opened"):
        SharedMemory.open(handle)


def test_memory_goes_with_the_last_that_points_into_it() -> None:
    def mapped() -> bool:
        return "memfd:flashmoe" in Path("/proc/self/maps").read_text()

    memory = SharedMemory.make(4 * MIB)
    part = memory.array[MIB:]
    del memory
    assert mapped()
    part[:] = 1
    del part
    assert not mapped()


def test_memory_is_reserved_and_not_only_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMemory.make(8 * MIB)
    assert os.fstat(memory.handle[1]).st_blocks * 512 >= 8 * MIB
    monkeypatch.setattr(shared, "_available_bytes", lambda: MIB)
    with pytest.raises(fmg.CommError, match=f"no {2 * MIB} bytes of memory left to share, only {MIB}"):
        SharedMemory.make(2 * MIB)


@pytest.mark.parametrize(
    "value",
    [None, 3, -(2**80), "é\n", 0.1, float("inf"), True, b"\x00\xff", (), (1, ("a", None)), [1, (2,)],
     {"a": {1: (b"x",)}, (1, 2): []}],
)  # fmt: skip
def test_values_arrive_as_they_were(value: Any) -> None:
    back = shared.decode(shared.encode(value))
    assert back == value and type(back) is type(value)


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="ndarray"):
        shared.encode((1, np.zeros(1)))


def test_processes_that_have_ended_are_known() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        there = Process(child.pid, int(stat[19]))
        assert not there.ended() and not Process.mine().ended()
        assert Process(child.pid, there.start - 1).ended()  # another one had the number
        child.kill()
        while not there.ended():  # nobody has waited for it yet
            time.sleep(0.01)
    assert there.ended()


def forked() -> str:
    comm = join()
    layer = layer_of(comm)
    before = call(layer)
    child = os.fork()
    if child == 0:
        errors = [error_of(comm.barrier), error_of(lambda: call(layer)), error_of(comm.reset)]
        layer.close()
        comm.close()
        comm.close(abort=True)
        del layer, comm
        say("child." + ".".join(str("was forked from" in error) for error in errors))
        sys.exit(0)  # its ends of the interpreter tell nobody
    os.waitpid(child, 0)
    comm.barrier()
    assert call(layer) == before
    return before


def test_a_forked_child_has_no_part_in_it(tmp_path: Path) -> None:
    Group(tmp_path, __name__, "forked", 2).results()
    assert (tmp_path / "child.True.True.True").exists()
