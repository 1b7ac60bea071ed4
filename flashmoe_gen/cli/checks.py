"""Run a layer on several in-process ranks, and hold what comes out against the reference and against itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .. import LayerStats, comm, reference
from ..errors import CommError, FlashMoEError
from ..instrument import Instrument
from ..layer import MoELayer
from ..spec import MoESpec, Placement
from ..tile import Schedule, TileConfig
from .problem import Array, Problem

T = TypeVar("T")

# Relative L2 error against the float64 reference: of y, and of the route weights, which are float32 sums.
BOUNDS = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5, "float64": 1e-12}
TF32_BOUND = 1e-3
ROUTER_BOUND = 1e-5

# What a routing and a layer call of one rank gave: ids, weights, y, and the seconds of both.
_Ran = tuple[Array, Array, Array, float, float]


@dataclass(frozen=True)
class Call:
    """One routing and one layer call of one rank."""

    x: Array
    ids: Array
    weights: Array
    y: Array
    route_seconds: float
    layer_seconds: float
    stats: LayerStats


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    name: str
    passed: bool
    detail: str


class World:
    """The layer on every rank of a local group; a context manager.

    Args:
        problem: the weights, in the memory of where the layer runs.
        tile: tile configuration.
        schedule: order of the tasks, and how rows come back.
        spec: another world size than the problem's.
        gpu: all ranks run on the current GPU and share it; default: on the host.
        instrument: tracing or delays in the layers' kernels.
    """

    def __init__(
        self,
        problem: Problem,
        tile: TileConfig,
        schedule: Schedule,
        spec: MoESpec | None = None,
        *,
        gpu: bool = False,
        instrument: Instrument | None = None,
    ) -> None:
        self.spec = spec or problem.spec
        self._problem = problem
        self._run_all = self._on_streams if gpu else self._in_threads
        self._streams = [_new_stream() if gpu else None for _ in range(self.spec.world_size)]
        self._placement = Placement.default(self.spec.num_experts, self.spec.world_size)
        self._open = ExitStack()
        self._comms = comm.local_group(self.spec.world_size)
        self.layers = [
            self._open.enter_context(
                MoELayer(
                    self.spec,
                    target="cuda" if gpu else "host",
                    tile=tile,
                    schedule=schedule,
                    comm=rank,
                    placement=self._placement,
                    stream=stream,
                    instrument=instrument,
                )
            )
            for rank, stream in zip(self._comms, self._streams)
        ]
        self._experts = [problem.experts(self._placement, rank) for rank in range(self.spec.world_size)]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, tokens: list[Array]) -> list[Call]:
        """Route and run every rank's tokens."""
        before = [layer.stats() for layer in self.layers]
        ran = self._run_all(tokens)
        stats = [_difference(old, layer.stats()) for old, layer in zip(before, self.layers)]
        return [Call(x, *results, done) for x, results, done in zip(tokens, ran, stats)]

    def _in_threads(self, tokens: list[Array]) -> list[_Ran]:
        """Each rank in a thread of its own: a call on the host returns when it is done."""

        def call(rank: int) -> _Ran:
            layer, x = self.layers[rank], tokens[rank]
            start = time.perf_counter()
            ids, weights = layer.route(x, self._problem.router_weight)
            routed = time.perf_counter()
            y = layer(x, ids, weights, self._experts[rank])
            return ids, weights, y, routed - start, time.perf_counter() - routed

        return _on_ranks(self.spec.world_size, call, lambda: self._comms[0].close(abort=True))

    def _on_streams(self, tokens: list[Array]) -> list[_Ran]:
        """Each rank on a stream of its own, timed there by CUDA events: a call on a GPU returns before it has run."""
        import cupy

        inputs = [cupy.asarray(x) for x in tokens]
        # Made before the calls: an allocation may wait for the GPU, where ranks wait for each other. NaN shows in the
        # checks where a row is not written.
        outs = [cupy.full(x.shape, np.nan, x.dtype) for x in inputs]
        cupy.cuda.runtime.deviceSynchronize()
        start = self._mark()
        routes = [layer.route(x, self._problem.router_weight) for layer, x in zip(self.layers, inputs)]
        routed = self._mark()
        cupy.cuda.runtime.deviceSynchronize()  # so that no rank waits for one whose router is still being loaded
        begin = self._mark()
        for layer, x, (ids, weights), experts, y in zip(self.layers, inputs, routes, self._experts, outs):
            layer(x, ids, weights, experts, out=y)
        end = self._mark()
        for layer in self.layers:
            layer.check()
        elapsed = cupy.cuda.get_elapsed_time  # milliseconds
        return [
            (
                cupy.asnumpy(ids), cupy.asnumpy(weights), cupy.asnumpy(y),
                elapsed(start[rank], routed[rank]) / 1e3, elapsed(begin[rank], end[rank]) / 1e3,
            )
            for rank, ((ids, weights), y) in enumerate(zip(routes, outs))
        ]  # fmt: skip

    def _mark(self) -> list[Any]:
        """An event on every rank's stream, never between the calls of two ranks: streams may share a hardware queue, where an
        event that waits for one rank's call would hold back the call of another that it waits for."""
        import cupy

        events = [cupy.cuda.Event() for _ in self._streams]
        for event, stream in zip(events, self._streams):
            event.record(stream)
        return events


def output_bound(spec: MoESpec, tile: TileConfig, *, gpu: bool) -> float:
    """The relative L2 error that y may have; float32 is TF32 on a GPU unless the tile says otherwise."""
    if gpu and spec.dtype == "float32" and tile.math != "ffma":
        return TF32_BOUND
    return BOUNDS[spec.dtype]


def uneven(tokens: list[Array]) -> list[Array]:
    """Fewer tokens from rank to rank, none on the last of several."""
    last = len(tokens) - 1
    return [x[: len(x) * (last - rank) // last] if last else x[: (len(x) + 1) // 2] for rank, x in enumerate(tokens)]


def check_routes(problem: Problem, calls: list[Call]) -> tuple[Check, list[float]]:
    """Whether every rank chose experts as good as the reference's; the relative error of each rank's weights."""
    errors, same, gap = [], 0, 0.0
    for call in calls:
        ids, weights = reference.route(problem.spec, call.x, problem.router_weight)
        logits = call.x.astype(np.float64) @ problem.router_weight.astype(np.float64).T
        chosen, best = (np.take_along_axis(logits, which.astype(np.int64), 1) for which in (call.ids, ids))
        gap = max(gap, float(np.abs(chosen - best).max(initial=0.0) / max(1.0, np.abs(logits).max(initial=0.0))))
        same += int((call.ids == ids).all(axis=1).sum())
        errors.append(relative_error(call.weights, weights))
    count = sum(len(call.x) for call in calls)
    passed = gap <= ROUTER_BOUND and max(errors) <= ROUTER_BOUND
    detail = f"same experts for {same} of {count} tokens, weights within {max(errors):.1e} (bound {ROUTER_BOUND:.0e})"
    return Check("routes agree with the float64 reference", passed, detail), errors


def check_outputs(problem: Problem, calls: list[Call], bound: float) -> tuple[Check, list[float]]:
    """Whether every rank's y is within ``bound`` of the reference, and each rank's relative error.

    Without a capacity tokens do not see each other, so all ranks go through the reference at once: then every expert
    is converted to float64 once.
    """
    spec = problem.spec
    groups = [[call] for call in calls] if spec.capacity is not None else [calls]
    errors = []
    for group in groups:
        x, ids, weights = (np.concatenate(parts) for parts in zip(*((c.x, c.ids, c.weights) for c in group)))
        want = reference.moe(spec, x, ids, weights, **problem.weights)
        ends = np.cumsum([len(call.x) for call in group])
        errors += [relative_error(call.y, want[end - len(call.x) : end]) for call, end in zip(group, ends)]
    detail = f"within {max(errors):.2e} (bound {bound:.0e})"
    return Check("y of every rank agrees with the float64 reference", max(errors) <= bound, detail), errors


def check_same(name: str, detail: str, got: list[Call], want: list[Call]) -> Check:
    """Whether routes and outputs are equal bit for bit; ``got`` may hold only the first tokens of each of ``want``."""
    different = sum(
        int((_bits(have) != _bits(wanted[: len(have)])).any(axis=1).sum())
        for a, b in zip(got, want)
        for have, wanted in ((a.ids, b.ids), (a.weights, b.weights), (a.y, b.y))
    )
    return Check(name, different == 0, detail if different == 0 else f"{different} rows differ")


def joined(calls: list[Call]) -> Call:
    """The calls of all ranks as one call with all tokens."""
    first = calls[0]
    parts = {name: np.concatenate([getattr(c, name) for c in calls]) for name in ("x", "ids", "weights", "y")}
    return Call(**parts, route_seconds=first.route_seconds, layer_seconds=first.layer_seconds, stats=first.stats)


def relative_error(got: Array, want: Array) -> float:
    """Relative L2 error; the absolute one where nothing is expected. A NaN is infinitely wrong."""
    difference, size = float(np.linalg.norm(got.astype(np.float64) - want)), float(np.linalg.norm(want))
    error = difference / size if size else difference
    return error if np.isfinite(error) else float("inf")


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), array.shape[1] * array.itemsize)


def _difference(before: LayerStats, after: LayerStats) -> LayerStats:
    return LayerStats(**{name: value - vars(before)[name] for name, value in vars(after).items()})


def _new_stream() -> Any:
    import cupy

    return cupy.cuda.Stream(non_blocking=True)  # one that waits for the default stream would make ranks wait in turn


def _on_ranks(world_size: int, work: Callable[[int], T], abort: Callable[[], None]) -> list[T]:
    """``work`` of every rank in a thread of its own.

    An error, or Ctrl-C, ends the calls of all ranks by ``abort``: they would wait for the one that does not come. What is
    raised is where it began, not what followed from it on the other ranks.
    """
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            abort()

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for thread in threads:
            thread.join()
    except BaseException as error:
        abort()
        for thread in started:
            thread.join()
        if isinstance(error, RuntimeError):
            raise FlashMoEError(f"The system refused to start {world_size} threads: {error}.") from error
        raise
    if errors:
        raise min(errors, key=lambda error: type(error) is CommError)
    return results
