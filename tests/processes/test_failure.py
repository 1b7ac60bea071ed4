"""A rank that raises, dies, lags or leaves becomes an exception of its peers that names it, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from group import Group, error_of, join, say
from work import bad_call, call, layer_of

import flashmoe_gen as fmg

Told = list[dict[str, Any]]
AT_ONCE_S = 20  # on a busy machine, with a compiler at work; the deadline is 60 s


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What three ranks returned of the functions below, at the default deadline but for collectives: nobody may wait for it."""
    work = "bad_input_first bad_input_late bad_input_again in_route interrupted late closing aborting"
    return Group(tmp_path_factory.mktemp("failure"), __name__, work, 3).results()


def timed(work: Any) -> list[Any]:
    start = time.monotonic()
    return [error_of(work), time.monotonic() - start]


def bad_input(bad_s: float, good_s: float) -> list[Any]:
    with join() as comm, layer_of(comm) as layer:
        before = call(layer)
        told = []
        for _ in range(2):
            time.sleep(bad_s if comm.rank == 1 else good_s)
            told.append(timed(lambda: bad_call(layer) if comm.rank == 1 else call(layer)))
            if comm.rank != 1:
                told.append(timed(layer.check))
            comm.reset()
            assert call(layer) == before and call(layer) == before
        comm.barrier()
        return told


def bad_input_first() -> list[Any]:
    return bad_input(0, 0.2)


def bad_input_late() -> list[Any]:
    return bad_input(0.2, 0)


@pytest.mark.parametrize("which", ["bad_input_first", "bad_input_late"])
def test_bad_input_on_one_rank(told: Told, which: str) -> None:
    """The peers raise at once, whether they were in the call already or came later; after reset() all is right again."""
    for rank, results in enumerate(told):
        for error, seconds in results[which]:
            assert "SpecError: x has shape" in error and seconds < AT_ONCE_S
            assert rank == 1 or error.startswith(
                "CommError: The communicator has failed: Rank 1 raised SpecError: x has"
            )


def bad_input_again() -> str:
    """While no peer is in the call, whoever raised may make it after all."""
    with join() as comm, layer_of(comm) as layer:
        before = call(layer)
        error = error_of(lambda: bad_call(layer)) if comm.rank == 1 else ""
        comm.barrier()
        if comm.rank != 1:
            time.sleep(0.3)
        assert call(layer) == before
        comm.barrier()
        return error


def test_a_call_may_be_made_after_all(told: Told) -> None:
    assert told[1]["bad_input_again"].startswith("SpecError: x has shape")


def in_route() -> list[Any]:
    with join() as comm, layer_of(comm) as layer:
        call(layer)
        result = timed((lambda: layer.route(None, None)) if comm.rank == 1 else lambda: call(layer))
        comm.reset()
        call(layer)
        comm.barrier()
        return result


def test_an_error_in_route(told: Told) -> None:
    assert told[1]["in_route"][0].startswith("SpecError")
    for rank in (0, 2):
        error, seconds = told[rank]["in_route"]
        assert "Rank 1 raised SpecError: x " in error and seconds < AT_ONCE_S


def interrupted() -> list[Any]:
    """Ctrl-C in a call, in a barrier, and while peers make a layer."""
    with join() as comm, layer_of(comm) as layer:
        before, told = call(layer), []
        for work in (lambda: call(layer), comm.barrier, lambda: layer_of(comm)):
            if comm.rank == 1:
                threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
                with pytest.raises(KeyboardInterrupt):
                    work()
            elif comm.rank == 0:
                told.append(timed(work))
            else:
                time.sleep(1)
                told.append(timed(work))
            comm.reset()
            assert call(layer) == before
        comm.barrier()
        return told


def test_ctrl_c_on_one_rank(told: Told) -> None:
    for rank in (0, 2):
        for error, seconds in told[rank]["interrupted"]:
            assert "Rank 1 raised KeyboardInterrupt" in error and seconds < AT_ONCE_S


def late() -> list[Any]:
    """A rank comes late to a call and a collective; and not at all, by a short deadline."""
    with join() as comm, layer_of(comm) as layer:
        before = call(layer)
        comm.barrier()
        time.sleep(0.6 * (comm.rank == 2))
        assert call(layer) == before
        time.sleep(0.4 * (comm.rank == 2))
        comm.barrier()
        os.environ["FLASHMOE_TIMEOUT_S"] = "0.5"
        errors = [timed(comm.barrier) if comm.rank != 2 else time.sleep(1.2)]
        errors.append(timed(lambda: call(layer)) if comm.rank != 2 else time.sleep(1.2))
        os.environ["FLASHMOE_TIMEOUT_S"] = "30"
        if comm.rank == 2:
            errors = [timed(comm.check), timed(comm.check)]
        comm.reset()
        assert call(layer) == before
        comm.barrier()
        return errors


def test_a_late_rank(told: Told) -> None:
    for rank in (0, 1):
        (barrier, waited), (kernel, ran) = told[rank]["late"]
        assert barrier.startswith("CommError: barrier(): rank") and "2 did not come within 0.5 s." in barrier
        assert 0.5 <= waited < AT_ONCE_S
        assert kernel.startswith("KernelTimeoutError: rank ") and "of rank 2 (expected" in kernel and ran < AT_ONCE_S
        assert "has ended" not in kernel
    assert "The communicator has failed: a wait of rank" in told[2]["late"][0][0]  # it was in neither, and knows


def close_in(order: tuple[int, ...]) -> list[Any]:
    comm = join()
    layer = layer_of(comm)
    call(layer)
    comm.barrier()
    time.sleep(0.3 * order.index(comm.rank))
    told = []
    if comm.rank == order[-1]:
        told.append([timed(lambda: call(layer)), timed(comm.barrier), timed(comm.reset), timed(layer.check)])
    layer.close()
    comm.close()
    told.append([error_of(lambda: call(layer)), error_of(comm.barrier)])
    comm.close()
    return told


def closing() -> list[Any]:
    """In every order; who still uses the group is told at once."""
    told = [*close_in((0, 1, 2)), *close_in((2, 0, 1))]
    comm = join()
    layer = layer_of(comm)
    call(layer)
    time.sleep(0.5 * (comm.rank == 1))
    told.append(timed(comm.close if comm.rank == 1 else lambda: call(layer)))
    return told


def test_closing_in_any_order(told: Told) -> None:
    for rank, last in ((2, 0), (1, 1)):
        used, barrier, reset, check = told[rank]["closing"][last]
        for error, seconds in (used, barrier, reset):
            assert "rank 0 has closed its communicator" in error and seconds < AT_ONCE_S
        assert check[0] == ""  # its calls went well
    for rank in range(3):
        after = [results for results in told[rank]["closing"] if len(results) == 2 and isinstance(results[1], str)]
        assert after == 2 * [2 * ["CommError: The communicator is closed."]]
    for rank in (0, 2):
        error, seconds = told[rank]["closing"][-1]
        assert "rank 1 has closed its communicator" in error and seconds < AT_ONCE_S


def aborting() -> list[Any]:
    comm = join()
    layer = layer_of(comm)
    call(layer)
    if comm.rank == 1:
        time.sleep(0.4)
        result = timed(lambda: comm.close(abort=True))
        comm.close(abort=True)
        comm.close()
    else:
        result = timed(lambda: call(layer))
        comm.close(abort=bool(comm.rank))
    return [*result, error_of(comm.barrier)]


def test_abort_ends_the_calls_of_all(told: Told) -> None:
    assert told[1]["aborting"][0] == "" and told[1]["aborting"][1] < AT_ONCE_S
    for rank in (0, 2):
        error, seconds, closed = told[rank]["aborting"]
        assert "rank 1 has closed it with abort=True" in error and seconds < AT_ONCE_S
        assert closed.startswith("CommError: The communicator is closed")


def leaving() -> list[Any]:
    """A program ends, by an exception that nobody catches, while its peers wait for it."""
    comm = join()
    layer = layer_of(comm)
    call(layer)
    if comm.rank == 1:
        say("leaving")
        raise SystemExit("an error")
    return [timed(lambda: call(layer)), timed(comm.barrier)]


def test_a_program_that_ends_tells_and_waits_for_nobody(tmp_path: Path) -> None:
    group = Group(tmp_path, __name__, "leaving", 3)
    group.await_file("leaving")
    start = time.monotonic()
    assert group.ranks[1].wait(AT_ONCE_S) == 1 and time.monotonic() - start < AT_ONCE_S
    for rank, results in enumerate(group.results(without=(1,))):
        for error, seconds in results or ():
            assert rank != 1 and "has closed its communicator" in error and seconds < AT_ONCE_S


# ---- Killed ----


def survive(what: str) -> list[Any]:
    comm = join()
    layer = layer_of(comm)
    call(layer)
    comm.barrier()
    if comm.rank == 1:
        say("ready")
        signal.pause()
    maps = Path("/proc/self/maps").read_text()
    assert "memfd:flashmoe (deleted)" in maps and "/dev/shm" not in maps  # it has no name that could stay behind
    work = {"exchange": comm.barrier, "kernel": lambda: call(layer), "making": lambda: layer_of(comm)}[what]
    told = [*timed(work), error_of(comm.check), error_of(comm.reset)]
    start = time.monotonic()
    comm.close()
    return [*told, time.monotonic() - start]


@pytest.mark.parametrize("what", ["exchange", "kernel", "making"])
def test_a_killed_rank_is_named(tmp_path: Path, what: str) -> None:
    group = Group(tmp_path, __name__, "survive", 3, what, FLASHMOE_TIMEOUT_S="2")
    group.await_file("ready")
    time.sleep(0.3)
    group.ranks[1].kill()
    pid = group.ranks[1].pid
    for rank, told in enumerate(group.results(without=(1,))):
        if rank == 1:
            continue
        error, seconds, check, reset, closing = told
        assert f"the process of rank 1 (pid {pid}) has ended" in error or "The process of rank 1 has ended" in error
        assert ("KernelTimeoutError" in error) == (what == "kernel")
        assert "rank 1" in check and f"rank 1 (pid {pid}) has ended" in reset
        assert seconds < 2 + AT_ONCE_S and closing < AT_ONCE_S


def churn() -> list[Any]:
    """Everything that ranks do, until a peer is no more."""
    comm = join()
    start = time.monotonic()
    say(f"ready{comm.rank}")
    try:
        while True:
            with layer_of(comm) as layer:
                for _ in range(20):
                    call(layer)
                layer.set_placement(fmg.Placement([[7, 6], [5, 4, 3, 2], [1, 0]]))
                call(layer)
            comm.barrier()
            comm.split(comm.rank // 2).close()
            comm.reset()
    except fmg.CommError as error:
        return [
            f"{type(error).__name__}: {error}",
            error_of(comm.check),
            error_of(comm.reset),
            time.monotonic() - start,
        ]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    victim, after = draw.randrange(3), draw.uniform(0, 3)
    group = Group(tmp_path, __name__, "churn", 3, FLASHMOE_TIMEOUT_S="3")
    for rank in range(3):
        group.await_file(f"ready{rank}")
    time.sleep(after)
    group.ranks[victim].send_signal(signal.SIGKILL)
    for rank, told in enumerate(group.results(without=(victim,))):
        if rank != victim:
            *errors, seconds = told
            assert any(f"rank {victim} (pid {group.ranks[victim].pid}) has ended" in error for error in errors), errors
            assert seconds < after + 3 + AT_ONCE_S
