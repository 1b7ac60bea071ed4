"""Exceptions and signals at odd moments: a call either returns what is right or raises, and what comes after works or says why."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from test_threads import EXPERTS, PROBLEM, SPEC, assert_right, call, inputs_of, together
from world import World, on_ranks

import flashmoe_gen as fmg
from flashmoe_gen.call import Packer
from flashmoe_gen.launch.host import HostTarget


class AlarmError(Exception):
    """What a signal handler raises."""


@contextmanager
def handler(number: int, work: Callable[[], Any]) -> Iterator[None]:
    before = signal.signal(number, lambda *_: work())
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def signal_in_first_launch(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """The signal comes while the first launch from here on is being waited for."""
    launch, first = HostTarget.launch, [True]

    def interrupted(self: HostTarget, *args: Any, **options: Any) -> None:
        if first and threading.current_thread() is threading.main_thread():
            first.clear()
            threading.Timer(0.1, os.kill, [os.getpid(), number]).start()
            time.sleep(0.15)  # so that it is there when the launch looks for the first time
        launch(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HostTarget, "launch", interrupted)
        yield


def raise_alarm() -> None:
    raise AlarmError


def test_a_handler_that_raises_ends_a_call_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with fmg.MoELayer(SPEC, target="host") as layer, handler(signal.SIGALRM, raise_alarm):
        router_weight = PROBLEM.tokens(8, 1)
        for use in (lambda: layer(*inputs_of(0), EXPERTS), lambda: layer.route(inputs_of(0)[0], router_weight)):
            with signal_in_first_launch(monkeypatch, signal.SIGALRM), pytest.raises(AlarmError):
                use()
            assert_right(layer(*inputs_of(1), EXPERTS), inputs_of(1))
            layer.check()


def test_a_handler_that_raises_in_route_of_a_rank_leaves_calls_right(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(SPEC.replace(world_size=2))
    inputs = [inputs_of(rank) for rank in range(2)]
    with handler(signal.SIGALRM, raise_alarm), signal_in_first_launch(monkeypatch, signal.SIGALRM), pytest.raises(AlarmError):
        world.layers[0].route(inputs[0][0], PROBLEM.tokens(8, 1))
    def later(rank: int) -> np.ndarray:
        time.sleep(0.2 * rank)  # rank 0, which had raised, comes first
        return call(world, rank, inputs[rank])

    for y, case in zip(on_ranks(2, later), inputs):
        assert_right(y, case)


def test_ctrl_c_in_route_does_not_end_the_call_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with fmg.MoELayer(SPEC, target="host") as layer:
        results: list[Any] = []

        def worker() -> None:
            for _ in range(100):
                results.append(layer(*inputs_of(0), EXPERTS))

        thread = threading.Thread(target=worker)
        thread.start()
        with signal_in_first_launch(monkeypatch, signal.SIGINT), pytest.raises(KeyboardInterrupt):
            layer.route(inputs_of(0)[0], PROBLEM.tokens(8, 1))
        thread.join()
        assert len(results) == 100
        for y in results:
            assert_right(y, inputs_of(0))


USES: dict[str, Callable[[fmg.MoELayer], Any]] = {
    "close": lambda layer: layer.close(),
    "close of the communicator": lambda layer: layer.comm.close(),
    "set_placement": lambda layer: layer.set_placement(fmg.Placement([list(range(8))])),
    "a call": lambda layer: layer(*inputs_of(1), EXPERTS),
}


@pytest.mark.parametrize("name", USES)
def test_a_handler_cannot_change_what_the_call_it_interrupts_uses(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layer, seen = fmg.MoELayer(SPEC, target="host"), []

    def use() -> None:
        with pytest.raises(fmg.CommError, match="inside a call of the same rank"):
            USES[name](layer)
        seen.append(name)

    with handler(signal.SIGUSR1, use), signal_in_first_launch(monkeypatch, signal.SIGUSR1):
        assert_right(layer(*inputs_of(0), EXPERTS), inputs_of(0))
    assert seen == [name]
    layer.close()


def test_a_placement_that_fails_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with fmg.MoELayer(SPEC, target="host") as layer:
        for step in ("upload", "allocate"):
            with monkeypatch.context() as patch:
                patch.setattr(HostTarget, step, lambda *_: raise_alarm())
                with pytest.raises(AlarmError):
                    layer.set_placement(fmg.Placement([[7, 6, 5, 4, 3, 2, 1, 0]]))
            assert_right(layer(*inputs_of(0), EXPERTS), inputs_of(0))


def test_many_ctrl_cs_leave_no_lock_and_no_launch_behind() -> None:
    """At any moment of small calls, from a timer of the operating system."""
    with fmg.MoELayer(SPEC, target="host") as layer:
        want = layer(*inputs_of(0), EXPERTS).tobytes()
        interrupts = 0
        end = time.monotonic() + 4
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.003 * np.random.default_rng(interrupts).random())
                with handler(signal.SIGALRM, lambda: signal.raise_signal(signal.SIGINT)):
                    while True:
                        assert layer(*inputs_of(0), EXPERTS).tobytes() == want
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        assert interrupts > 20
        assert together(layer.stats, lambda: layer(*inputs_of(0), EXPERTS).tobytes())[1] == want
        assert not layer.comm._words.launches
        layer.comm.reset()
        assert layer(*inputs_of(0), EXPERTS).tobytes() == want


# ---- What moves or is told while arguments are packed ----


def test_a_heap_that_moves_while_arguments_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, larger = fmg.MoELayer(SPEC, target="host"), []
    pack = Packer.__call__

    def slow(self: Packer, *args: Any) -> Any:
        packed = pack(self, *args)
        if not larger:
            larger.append(fmg.MoELayer(SPEC.replace(max_tokens=4096), target="host", comm=layer.comm))
        return packed

    monkeypatch.setattr(Packer, "__call__", slow)
    assert_right(layer(*inputs_of(0), EXPERTS), inputs_of(0))
    assert_right(larger[0](*inputs_of(1), EXPERTS), inputs_of(1))


class Slow:
    """An array that takes its time."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> object:
        time.sleep(0.4)
        return self.array.__dlpack__(**options)


def test_a_rank_that_still_packs_is_told() -> None:
    world = World(SPEC.replace(world_size=2))
    x, ids, weights = inputs_of(0)

    def refuse() -> None:
        time.sleep(0.1)
        call(world, 1, (x[:, :-1], ids, weights))

    y, error = together(lambda: call(world, 0, (Slow(x), ids, weights)), refuse)
    assert isinstance(error, fmg.SpecError)
    assert isinstance(y, fmg.CommError) and "Rank 1 raised SpecError: x has shape" in str(y)


@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_may_follow_a_reset_at_once(ranks: int) -> None:
    world = World(SPEC.replace(world_size=ranks))
    inputs = [inputs_of(rank) for rank in range(ranks)]

    def work(rank: int) -> None:
        for _ in range(15):
            world.comms[rank].reset()
            assert_right(call(world, rank, inputs[rank]), inputs[rank])

    on_ranks(ranks, work)


@pytest.mark.parametrize("what", ["layer", "communicator"])
def test_a_rank_that_closes_tells_those_that_wait_for_it(what: str) -> None:
    world = World(SPEC.replace(world_size=2))

    def close() -> None:
        time.sleep(0.2)
        (world.layers if what == "layer" else world.comms)[1].close()

    y, done = together(lambda: call(world, 0, inputs_of(0)), close)
    assert done is None
    assert isinstance(y, fmg.CommError) and "rank 1 has closed its" in str(y)


def test_ranks_that_call_different_things_are_told() -> None:
    world = World(SPEC.replace(world_size=2))
    second = [fmg.MoELayer(world.spec, target="host", comm=comm) for comm in world.comms]
    experts = [PROBLEM.experts(world.placement.local_experts(rank)) for rank in range(2)]
    errors = together(lambda: world.layers[0](*inputs_of(0), experts[0]), lambda: second[1](*inputs_of(1), experts[1]))
    assert all(isinstance(error, fmg.CommError) and "calls its layer" in str(error) for error in errors)
    on_ranks(2, lambda rank: world.comms[rank].reset())
    world.layers[0].set_placement(fmg.Placement([[4, 5, 6, 7], [0, 1, 2, 3]]))
    errors = together(*(lambda r=r: world.layers[r](*inputs_of(r), experts[r]) for r in range(2)))
    assert all(isinstance(error, fmg.CommError) and "with different placements" in str(error) for error in errors)


def test_ranks_that_fail_and_try_again_do_not_hold_it_against_each_other() -> None:
    spec, comms = SPEC.replace(world_size=2), fmg.comm.local_group(2)
    inputs = [inputs_of(rank) for rank in range(2)]

    def rank(n: int) -> np.ndarray:
        with pytest.raises(fmg.SpecError):
            fmg.MoELayer(spec, target="host", comm=comms[n], placement=fmg.Placement([[0], [1]]))
        time.sleep(0.4 * n)
        layer = fmg.MoELayer(spec, target="host", comm=comms[n])
        return layer(*inputs[n], PROBLEM.experts(range(4 * n, 4 * n + 4)))

    for y, case in zip(on_ranks(2, rank), inputs):
        assert_right(y, case)


@pytest.mark.parametrize("colors", [(0, 0, 1, 1), (-1, -1, -2, -2), (-3, 5, -3, 5)])
def test_split_takes_any_color(colors: tuple[int, ...]) -> None:
    comms = fmg.comm.local_group(4)
    parts = on_ranks(4, lambda rank: comms[rank].split(colors[rank]))
    assert [part.world_size for part in parts] == [2] * 4
    assert [part.rank for part in parts] == [sum(c == colors[r] for c in colors[:r]) for r in range(4)]
    with pytest.raises(fmg.SpecError, match="color='a' is not valid"):
        comms[0].split("a")  # type: ignore[arg-type]


def test_a_fork_during_a_call_of_another_thread() -> None:
    """The child has neither the thread nor its locks."""
    with fmg.MoELayer(SPEC, target="host") as layer:
        want = layer(*inputs_of(0), EXPERTS).tobytes()
        stop = threading.Event()

        def worker() -> None:
            while not stop.is_set():
                layer(*inputs_of(1), EXPERTS)

        thread = threading.Thread(target=worker)
        thread.start()
        try:
            for _ in range(3):
                child = os.fork()
                if child == 0:
                    os._exit(0 if layer(*inputs_of(0), EXPERTS).tobytes() == want else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            thread.join()


def test_out_may_be_x_but_no_other_argument() -> None:
    x, ids, weights = inputs_of(0)
    with fmg.MoELayer(SPEC, target="host") as layer:
        memory = np.zeros(64 * 64 + 128, np.float32)
        out = memory[: 64 * 64].reshape(64, 64)
        inside, ids_inside = memory[:128].reshape(64, 2), memory[64:192].view(np.int32).reshape(64, 2)
        for name, case in (("topk_weights", (x, ids, inside)), ("topk_ids", (x, ids_inside, weights))):
            with pytest.raises(fmg.SpecError, match=f"out shares memory with {name}"):
                layer(*case, EXPERTS, out=out)
        in_place = x.copy()
        layer(in_place, ids, weights, EXPERTS, out=in_place)
        assert_right(in_place, (x, ids, weights))
