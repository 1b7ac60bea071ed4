"""Layers and communicators used from several threads: right results or a CommError, never wrong numbers, never freed memory."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from world import BOUNDS, Problem, World, on_ranks, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.launch.host import HostTarget

SPEC = fmg.MoESpec(64, 48, 8, 2, dtype="float32", max_tokens=64)
PROBLEM = Problem(SPEC)
EXPERTS = PROBLEM.experts(range(8))


def inputs_of(seed: int, count: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (PROBLEM.tokens(count, seed), *routes(SPEC, count, "uniform", seed))


def assert_right(y: np.ndarray, inputs: tuple[np.ndarray, ...]) -> None:
    assert relative_error(y, PROBLEM.reference(*inputs)) <= BOUNDS["float32"]


def together(*work: Callable[[], Any]) -> list[Any]:
    """Run things at the same time; the results, or the exceptions that came instead."""
    results: list[Any] = [None] * len(work)
    gate = threading.Barrier(len(work))

    def body(n: int) -> None:
        gate.wait()
        try:
            results[n] = work[n]()
        except BaseException as error:
            results[n] = error

    threads = [threading.Thread(target=body, args=(n,)) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def many(layer: fmg.MoELayer, seed: int, calls: int = 12) -> None:
    inputs = inputs_of(seed)
    want = PROBLEM.reference(*inputs)
    for _ in range(calls):
        assert relative_error(layer(*inputs, EXPERTS), want) <= BOUNDS["float32"]


def test_one_layer_from_several_threads() -> None:
    with fmg.MoELayer(SPEC, target="host") as layer:
        assert together(*(lambda n=n: many(layer, n) for n in range(3))) == [None] * 3
        assert layer.stats().calls == 36


def test_layers_of_one_communicator_from_several_threads() -> None:
    comm = fmg.comm.init("single")
    layers = [fmg.MoELayer(SPEC, target="host", comm=comm) for _ in range(3)]
    assert together(*(lambda n=n: many(layers[n], n) for n in range(3))) == [None] * 3


def test_one_router_from_several_threads() -> None:
    spec = SPEC.replace(num_experts=64, top_k=8)
    weight = np.random.default_rng(9).standard_normal((64, 64)).astype(np.float32)
    with fmg.MoELayer(spec, target="host") as layer:
        xs = [inputs_of(n)[0] for n in range(3)]
        want = [layer.route(x, weight) for x in xs]

        def route(n: int) -> None:
            for _ in range(60):
                for got, wanted in zip(layer.route(xs[n], weight), want[n]):
                    np.testing.assert_array_equal(got, wanted)

        assert together(*(lambda n=n: route(n) for n in range(3))) == [None] * 3


@contextmanager
def slow_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Launches that take long enough for others to come in between; the event says that one runs."""
    running = threading.Event()
    launch = HostTarget.launch

    def slow(self: HostTarget, kernel: Any, args: Any, *rest: Any, **options: Any) -> None:
        running.set()
        time.sleep(0.3)
        launch(self, kernel, args, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HostTarget, "launch", slow)
        yield running


MEANWHILE: dict[str, Callable[[fmg.MoELayer], Any]] = {
    "close": lambda layer: layer.close(),
    "set_placement": lambda layer: layer.set_placement(fmg.Placement([list(range(8))])),
    "stats": lambda layer: layer.stats(),
    "check": lambda layer: layer.check(),
    "close of the communicator": lambda layer: layer.comm.close(),
    "another layer": lambda layer: fmg.MoELayer(SPEC, target="host", comm=layer.comm),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_other_threads_do_waits_for_the_call(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    layer, inputs = fmg.MoELayer(SPEC, target="host"), inputs_of(0)
    with slow_launches(monkeypatch) as running:

        def meanwhile() -> None:
            assert running.wait(30)
            MEANWHILE[what](layer)

        y, done = together(lambda: layer(*inputs, EXPERTS), meanwhile)
    assert done is None
    assert_right(y, inputs)


def test_a_larger_layer_is_not_made_during_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap cannot move any more."""
    layer, inputs = fmg.MoELayer(SPEC, target="host"), inputs_of(0)
    with slow_launches(monkeypatch) as running:

        def meanwhile() -> None:
            assert running.wait(30)
            fmg.MoELayer(SPEC.replace(max_tokens=4096), target="host", comm=layer.comm)

        y, error = together(lambda: layer(*inputs, EXPERTS), meanwhile)
    assert isinstance(error, fmg.CommError) and "stays where it is since the first call" in str(error)
    assert_right(y, inputs)


def test_with_several_ranks_a_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(SPEC.replace(world_size=2))
    inputs = [inputs_of(rank) for rank in range(2)]
    experts = [PROBLEM.experts(world.placement.local_experts(rank)) for rank in range(2)]
    with slow_launches(monkeypatch) as running:

        def late() -> np.ndarray:
            assert running.wait(30)
            return world.layers[0](*inputs[0], experts[0])

        first, other, second = together(*(lambda r=r: world.layers[r](*inputs[r], experts[r]) for r in range(2)), late)
    refused, y = sorted((first, second), key=lambda result: isinstance(result, np.ndarray))  # whoever comes second
    assert isinstance(refused, fmg.CommError) and "Rank 0 is called from two threads" in str(refused)
    assert_right(y, inputs[0])
    assert_right(other, inputs[1])


def test_layers_of_two_ranks_on_one_communicator_are_refused() -> None:
    """Both threads learn of it at once: neither waits for a rank that never comes."""
    comm = fmg.comm.local_group(2)[0]
    layers = [fmg.MoELayer(SPEC.replace(world_size=2), target="host", comm=comm) for _ in range(2)]
    experts = PROBLEM.experts(range(4))
    errors = together(*(lambda n=n: layers[n](*inputs_of(n), experts) for n in range(2)))
    assert all(isinstance(error, fmg.CommError) and "each rank needs a communicator of its own" in str(error) for error in errors)


def test_a_rank_that_makes_no_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.2")
    comm = fmg.comm.local_group(2)[1]
    layer = fmg.MoELayer(SPEC.replace(world_size=2), target="host", comm=comm)
    message = "The making of layer 0: rank 0 did not come within 0.2 s"
    with pytest.raises(fmg.CommError, match=message):
        layer(*inputs_of(0), PROBLEM.experts(range(4, 8)))


@pytest.mark.parametrize("change", [{"top_k": 3}, {"hidden_size": 128}, {"capacity": 4}, {"activation": "gelu"}])
def test_ranks_with_different_layers_are_told_what_differs(change: dict[str, Any]) -> None:
    comms = fmg.comm.local_group(2)
    specs = [SPEC.replace(world_size=2), SPEC.replace(world_size=2, **change)]
    ((name, value),) = change.items()
    message = f"disagree on layer 0: .*{name}=.* on rank 0 and {name}={value!r} on rank 1"
    first = fmg.MoELayer(specs[0], target="host", comm=comms[0])
    with pytest.raises(fmg.CommError, match=message):
        fmg.MoELayer(specs[1], target="host", comm=comms[1])
    with pytest.raises(fmg.CommError, match=f"Rank 1 cannot make layer 0: .*{message}"):
        first(*inputs_of(0), PROBLEM.experts(range(4)))


def test_a_layer_that_another_rank_makes_late_is_waited_for() -> None:
    spec, comms = SPEC.replace(world_size=2), fmg.comm.local_group(2)
    inputs = [inputs_of(rank) for rank in range(2)]

    def rank(n: int) -> np.ndarray:
        time.sleep(0.3 * n)
        layer = fmg.MoELayer(spec, target="host", comm=comms[n])
        return layer(*inputs[n], PROBLEM.experts(range(4 * n, 4 * n + 4)))

    for y, case in zip(on_ranks(2, rank), inputs):
        assert_right(y, case)


# ---- Who is told ----


def bad(inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return (inputs[0][:, :-1], *inputs[1:])


def call(world: World, rank: int, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    return world.layers[rank](*inputs, PROBLEM.experts(world.placement.local_experts(rank)))


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_raises_tells_its_peers(late: int) -> None:
    """At the default deadline of a minute: whoever waits for it runs into the limit of this test."""
    world = World(SPEC.replace(world_size=3))
    inputs = [inputs_of(rank) for rank in range(3)]
    for _ in range(2):

        def one(rank: int) -> np.ndarray:
            time.sleep(0.2 if (rank == 1) == bool(late) else 0)  # rank 1 raises before or after the others have begun
            return call(world, rank, bad(inputs[1]) if rank == 1 else inputs[rank])

        results = together(*(lambda r=r: one(r) for r in range(3)))
        assert isinstance(results[1], fmg.SpecError)
        for rank in (0, 2):
            assert isinstance(results[rank], fmg.CommError)
            assert "Rank 1 raised SpecError: x has shape" in str(results[rank])
        with pytest.raises(fmg.CommError, match="Rank 1 raised SpecError"):
            world.layers[0].check()
        on_ranks(3, lambda rank: world.comms[rank].reset())
        for y, case in zip(on_ranks(3, lambda rank: call(world, rank, inputs[rank])), inputs):
            assert_right(y, case)


def test_an_error_in_route_is_told_too() -> None:
    world = World(SPEC.replace(world_size=2))
    inputs = [inputs_of(rank) for rank in range(2)]

    def failing() -> None:
        world.layers[1].route(inputs[1][0], np.zeros((7, 64), np.float32))

    y, error = together(lambda: call(world, 0, inputs[0]), failing)
    assert isinstance(error, fmg.SpecError)
    assert isinstance(y, fmg.CommError) and "Rank 1 raised SpecError: router_weight" in str(y)


def test_a_call_may_be_made_again_while_no_peer_waits_for_it() -> None:
    world = World(SPEC.replace(world_size=2))
    inputs = [inputs_of(rank) for rank in range(2)]
    for _ in range(3):
        with pytest.raises(fmg.SpecError):
            call(world, 1, bad(inputs[1]))
        for y, case in zip(on_ranks(2, lambda rank: call_later(world, rank, inputs)), inputs):
            assert_right(y, case)


def call_later(world: World, rank: int, inputs: list[Any]) -> np.ndarray:
    """Rank 1, which had raised, comes first."""
    time.sleep(0.2 * (rank == 0))
    return call(world, rank, inputs[rank])


def test_a_layer_that_cannot_be_made_is_told() -> None:
    spec, comms = SPEC.replace(world_size=2), fmg.comm.local_group(2)

    def second() -> None:
        fmg.MoELayer(spec, target="host", comm=comms[1], placement=fmg.Placement([[0], [1]]))

    layer = fmg.MoELayer(spec, target="host", comm=comms[0])
    y, error = together(lambda: layer(*inputs_of(0), PROBLEM.experts(range(4))), second)
    assert isinstance(error, fmg.SpecError)
    assert isinstance(y, fmg.CommError) and "Rank 1 cannot make layer 0: SpecError: placement has 2 experts" in str(y)


def test_a_deadline_on_one_rank_ends_the_calls_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(SPEC.replace(world_size=3))
    inputs = [inputs_of(rank) for rank in range(3)]
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.3")
    errors = together(*(lambda r=r: call(world, r, inputs[r]) for r in range(2)))
    assert all(isinstance(error, fmg.CommError) for error in errors)
    assert any(isinstance(error, fmg.KernelTimeoutError) and "rank 2" in str(error) for error in errors)


# ---- Calls that are ended ----


def test_abort_ends_the_calls_in_flight() -> None:
    world = World(SPEC.replace(world_size=2))

    def abort() -> None:
        time.sleep(0.3)
        world.comms[1].close(abort=True)

    error, done = together(lambda: call(world, 0, inputs_of(0)), abort)
    assert done is None
    assert isinstance(error, fmg.CommError) and "rank 1 has closed it with abort=True" in str(error)
    with pytest.raises(fmg.CommError, match="closed"):
        world.comms[0].barrier()


@contextmanager
def ctrl_c_during_a_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGINT for this (the main) thread soon after the first launch has begun."""
    launch, timers = HostTarget.launch, [threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])]

    def interrupted(self: HostTarget, *args: Any, **options: Any) -> None:
        if timers:
            timers.pop().start()
        launch(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HostTarget, "launch", interrupted)
        yield


def test_ctrl_c_ends_a_call_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(SPEC.replace(world_size=2))
    inputs = [inputs_of(rank) for rank in range(2)]
    with ctrl_c_during_a_launch(monkeypatch), pytest.raises(KeyboardInterrupt):
        call(world, 0, inputs[0])
    with pytest.raises(fmg.CommError, match="Rank 0 raised KeyboardInterrupt"):
        call(world, 1, inputs[1])
    on_ranks(2, lambda rank: world.comms[rank].reset())
    for y, case in zip(on_ranks(2, lambda rank: call(world, rank, inputs[rank])), inputs):
        assert_right(y, case)


def test_ctrl_c_ends_long_work_and_one_rank_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer and router with work for minutes; afterwards the layer works as ever."""
    spec = fmg.MoESpec(2048, 4096, 8, 8, max_tokens=8192)
    big = np.lib.stride_tricks.as_strided(np.zeros(4096, spec.element.numpy), (8, 4096, 2048), (0, 0, 2))
    experts = fmg.Experts(gate=big, up=big, down=np.lib.stride_tricks.as_strided(big, (8, 2048, 4096), (0, 0, 2)))
    x = np.zeros((8192, 2048), spec.element.numpy)
    ids, weights = np.tile(np.arange(8, dtype=np.int32), (8192, 1)), np.ones((8192, 8), np.float32)
    comm = fmg.comm.init("single")
    with fmg.MoELayer(spec, target="host", comm=comm) as layer, fmg.MoELayer(SPEC, target="host", comm=comm) as small:
        for use in (
            lambda: layer(x, ids, weights, experts),
            lambda: layer.route(np.zeros((8192, 2048), spec.element.numpy), np.zeros((8, 2048), spec.element.numpy)),
        ):
            with ctrl_c_during_a_launch(monkeypatch), pytest.raises(KeyboardInterrupt):
                for _ in range(1000):
                    use()
            many(small, 0, calls=2)
        ids, weights = layer.route(x[:3], np.zeros((8, 2048), spec.element.numpy))
        assert (ids == np.arange(8)).all()
