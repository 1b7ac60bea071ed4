"""One of several processes: runs groups of cases with the others and writes what came out, as JSON.

``python worker.py OUT_FOLDER TARGET GROUP ...`` under mpirun, torchrun, or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
from world import BOUNDS as HOST_BOUNDS
from world import Problem, routes
from world import relative_error as maybe_nan

import flashmoe_gen as fmg

KINDS = ("uniform", "skewed", "one", "few", "masked", "none")
GPU_WAYS = {
    "bfloat16/wgmma": 5e-3, "bfloat16/mma": 5e-3, "float16/wgmma": 1e-3, "float16/mma": 1e-3,
    "tf32/mma": 1e-3, "ffma/mma": 1e-5, "float64/mma": 1e-12,
}  # fmt: skip
HOST_WAYS = {f"{dtype}/host": bound for dtype, bound in HOST_BOUNDS.items()}
SHAPE = (144, 208, 7, 3)
Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Infinite where it is NaN, which no maximum would keep."""
    error = maybe_nan(got, want)
    return float("inf") if np.isnan(error) else error


class Rank:
    """This process: its communicator, its array library, and how layers are made and called."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.comm = fmg.comm.init("auto", target=target)
        self.rank, self.world = self.comm.rank, self.comm.world_size
        if target == "cuda":
            import cupy

            cupy.cuda.Device(self.comm.device).use()
            from flashmoe_gen.launch.cuda import CudaTarget

            self.xp, self.arch = cupy, CudaTarget(device=self.comm.device).arch
            self.ways = {way: bound for way, bound in GPU_WAYS.items() if way.endswith("/mma") or self.arch == "sm_90a"}
        else:
            self.xp, self.arch, self.ways = np, "host", HOST_WAYS
        wide = [self.spec(dtype) for dtype in ("float64", "float32")]
        self.comm.reserve(*wide)

    def spec(self, dtype: str, *, world: int | None = None, **fields: Any) -> fmg.MoESpec:
        options = {"max_tokens": 300, "world_size": self.world if world is None else world, **fields}
        return fmg.MoESpec(*SHAPE, dtype=dtype, **options)

    def way(self, way: str, **fields: Any) -> tuple[fmg.MoESpec, fmg.TileConfig | None]:
        """Spec and tile of one of ``ways``."""
        math, program = way.split("/")
        spec = self.spec("float32" if math in ("tf32", "ffma") else math, **fields)
        if program == "host":
            return spec, None
        tile = fmg.default_tile(spec, self.arch, program)  # type: ignore[arg-type]
        return spec, tile.replace(math=math) if spec.dtype == "float32" else tile

    def build(self, groups: list[str]) -> None:
        """Compile this rank's share of what the groups use: later each finds it in the cache, or waits for who compiles it.

        What does not compile is left to its layer, which raises.
        """
        first = next(iter(self.ways))
        kernels: list[tuple[Any, ...]] = [(*self.way(way), None) for way in (self.ways if "bounds" in groups else [first])]
        if "invariant" in groups:
            worlds = (self.world, 1)
            kernels += [(*self.way(way, batch_invariant=True, world=n), None) for way in self.ways for n in worlds]
        if "delays" in groups:
            kernels.append((*self.way(first), fmg.Instrument(delay_ns=1)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for spec, tile, instrument in kernels[self.rank :: self.world]:
                pool.submit(fmg.generate(spec, arch=self.arch, tile=tile, instrument=instrument).compile)

    def layer(self, spec: fmg.MoESpec, **options: Any) -> fmg.MoELayer:
        comm = self.comm if spec.world_size == self.world and self.world > 1 else None
        return fmg.MoELayer(spec, target=self.target, comm=comm, **options)

    def experts(self, problem: Problem, ids: Any) -> fmg.Experts:
        return fmg.Experts(**{name: self.xp.asarray(np.ascontiguousarray(w[list(ids)])) for name, w in problem.weights.items()})

    def case(self, problem: Problem, count: int, kind: str, seed: int) -> Case:
        return problem.tokens(count, seed), *routes(problem.spec, count, kind, seed)

    def send(self, case: Case) -> tuple[Any, Any, Any]:
        x, ids, weights = case
        return self.xp.asarray(x), self.xp.asarray(ids), self.xp.asarray(weights)

    def fetch(self, array: Any) -> np.ndarray:
        return np.asarray(array if self.xp is np else self.xp.asnumpy(array))

    def run(self, layer: fmg.MoELayer, case: Case, experts: fmg.Experts) -> np.ndarray:
        arrays = self.send(case)
        out = self.xp.full(arrays[0].shape, np.nan, arrays[0].dtype)
        layer(*arrays, experts, out=out)
        layer.check()
        return self.fetch(out)


def bounds(me: Rank) -> Any:
    """Every dtype and program, every kind of routing, uneven and zero tokens, both ways to combine: the largest errors."""
    found = {}
    for way, bound in me.ways.items():
        spec, tile = me.way(way)
        problem, worst = Problem(spec), 0.0
        for combine in ("route", "rank"):
            with me.layer(spec, tile=tile, schedule=fmg.Schedule(combine=combine)) as layer:
                experts = me.experts(problem, layer.placement.local_experts(me.rank))
                for n, kind in enumerate(KINDS):
                    case = me.case(problem, (300, 0, 17, 1)[(n + me.rank) % 4], kind, 10 * n + me.rank)
                    error = relative_error(me.run(layer, case, experts), problem.reference(*case))
                    worst = max(worst, error)
        found[way] = {"error": worst, "bound": bound}
    return found


def placements(me: Rank) -> Any:
    """All experts on the last rank; then in any order."""
    spec = me.spec(next(iter(me.ways)).split("/")[0])
    problem, worst = Problem(spec), 0.0
    shuffled = [int(e) for e in np.random.default_rng(3).permutation(spec.num_experts)]
    cut = [0, *[2 + rank for rank in range(me.world - 1)], spec.num_experts]
    slots = [[], *[[] for _ in range(me.world - 2)], list(range(spec.num_experts))], [
        shuffled[a:b] for a, b in zip(cut, cut[1:])
    ]
    with me.layer(spec, placement=fmg.Placement(slots[0])) as layer:
        for n, each in enumerate(slots):
            layer.set_placement(fmg.Placement(each))
            experts = me.experts(problem, each[me.rank])
            case = me.case(problem, 120 + 7 * me.rank, "uniform", n + 5 * me.rank)
            worst = max(worst, relative_error(me.run(layer, case, experts), problem.reference(*case)))
    return {"error": worst, "bound": 5e-3}


def invariant(me: Rank) -> Any:
    """With ``batch_invariant`` the bits are those of one GPU that has all experts."""
    equal = {}
    for way in me.ways:
        spec, tile = me.way(way, batch_invariant=True)
        alone, _ = me.way(way, batch_invariant=True, world=1)
        problem = Problem(spec)
        with me.layer(spec, tile=tile) as layer, me.layer(alone, tile=tile) as single:
            mine = me.experts(problem, layer.placement.local_experts(me.rank))
            every = me.experts(problem, range(spec.num_experts))
            same = True
            for n, kind in enumerate(KINDS[:5]):
                case = me.case(problem, (211, 5)[(n + me.rank) % 2], kind, 31 * n + me.rank)
                same &= me.run(layer, case, mine).tobytes() == me.run(single, case, every).tobytes()
        equal[way] = bool(same)
    return equal


def graphs(me: Rank, replays: int = 1000) -> Any:
    """One graph a rank, replayed with changing numbers of tokens; looked at every 50 times. On GPUs only."""
    assert me.target == "cuda", "only GPUs have graphs"
    cupy = me.xp
    spec = me.spec("bfloat16")
    problem = Problem(spec)
    worst, rng = 0.0, np.random.default_rng(me.rank)
    for combine in ("route", "rank"):
        with me.layer(spec, schedule=fmg.Schedule(combine=combine)) as layer:
            experts = me.experts(problem, layer.placement.local_experts(me.rank))
            case = me.case(problem, 300, "uniform", me.rank)
            arrays = me.send(case)
            want = problem.reference(*case)
            out, num_tokens = cupy.empty_like(arrays[0]), cupy.zeros(1, cupy.int32)
            layer(*arrays, experts, out=out)
            layer.check()
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                layer(*arrays, experts, out=out, num_tokens=num_tokens)
                graph = stream.end_capture()
                for n in range(replays // 2):
                    count = int(rng.integers(0, 301))
                    num_tokens.fill(count)
                    out.fill(np.nan)
                    graph.launch(stream)
                    if n % 50 == 0:
                        y = me.fetch(out)
                        worst = max(worst, relative_error(y[:count], want[:count]))
                        assert np.isnan(y[count:].astype(np.float32)).all()
                stream.synchronize()
            layer.check()
            me.comm.barrier()
    return {"error": worst, "bound": 5e-3, "replays": replays}


def many(me: Rank, calls: int = 10000) -> Any:
    """Calls one after the other with changing counts, none waited for."""
    calls = calls if me.target == "cuda" else calls // 10
    spec = me.spec(next(iter(me.ways)).split("/")[0])
    problem, rng = Problem(spec), np.random.default_rng(100 + me.rank)
    with me.layer(spec) as layer:
        experts = me.experts(problem, layer.placement.local_experts(me.rank))
        cases = [me.case(problem, 40, kind, 7 * n + me.rank) for n, kind in enumerate(KINDS)]
        arrays = [me.send(case) for case in cases]
        wants = [problem.reference(*case) for case in cases]
        outs = [me.xp.empty_like(x) for x, _, _ in arrays]
        worst = 0.0
        for n in range(calls):
            at, count = n % len(cases), int(rng.integers(0, 41))
            x, ids, weights = arrays[at]
            layer(x[:count], ids[:count], weights[:count], experts, out=outs[at][:count])
            if n % 500 == 499:
                layer.check()
                worst = max(worst, relative_error(me.fetch(outs[at][:count]), wants[at][:count]))
        layer.check()
        assert layer.stats().calls == calls
    return {"error": worst, "bound": 5e-3, "calls": calls}


def delays(me: Rank) -> Any:
    """Random waits before everything that is published change no bit."""
    spec, worst, same = me.spec("bfloat16"), 0.0, True
    problem = Problem(spec)
    for combine in ("route", "rank"):
        schedule, instrument = fmg.Schedule(combine=combine), fmg.Instrument(delay_ns=20_000)
        with me.layer(spec, schedule=schedule) as plain, me.layer(spec, schedule=schedule, instrument=instrument) as slow:
            experts = me.experts(problem, plain.placement.local_experts(me.rank))
            for n in range(12):
                case = me.case(problem, (60, 0, 7)[(n + me.rank) % 3], KINDS[n % len(KINDS)], 3 * n + me.rank)
                y, want = me.run(slow, case, experts), me.run(plain, case, experts)
                worst = max(worst, relative_error(y, problem.reference(*case)))
                same &= y.tobytes() == want.tobytes()
    return {"error": worst, "bound": 5e-3, "same_bits": same}


def two_layers(me: Rank) -> Any:
    """Two layers that share heap and scratch, in turns, without waiting; then on two streams."""
    dtype = next(iter(me.ways)).split("/")[0]
    specs = [me.spec(dtype), me.spec(dtype, max_tokens=64)]
    problems, worst = [Problem(spec, n) for n, spec in enumerate(specs)], 0.0
    layers = [me.layer(spec) for spec in specs]
    experts = [me.experts(p, layer.placement.local_experts(me.rank)) for p, layer in zip(problems, layers)]
    cases = [me.case(p, 50 + me.rank, "uniform", n) for n, p in enumerate(problems)]
    arrays = [me.send(case) for case in cases]
    outs = [me.xp.full(x.shape, np.nan, x.dtype) for x, _, _ in arrays]
    streams: list[Any] = [None, None]
    if me.target == "cuda":
        streams = [me.xp.cuda.Stream(non_blocking=True) for _ in range(2)]
        me.xp.cuda.runtime.deviceSynchronize()
    for n in range(40):
        options = {} if streams[0] is None else {"stream": streams[n % 2]}
        layers[n % 2](*arrays[n % 2], experts[n % 2], out=outs[n % 2], **options)
    for layer, problem, case, out in zip(layers, problems, cases, outs):
        layer.check()
        worst = max(worst, relative_error(me.fetch(out), problem.reference(*case)))
        layer.close()
    return {"error": worst, "bound": 5e-3}


def _error(work: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        work()
    except fmg.FlashMoEError as error:
        return {"type": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return {"type": "", "text": "", "seconds": time.monotonic() - start}


def bad_input(me: Rank) -> Any:
    """Rank 1 passes a wrong shape: it raises, the others are told why, and after reset() all is well."""
    spec = me.spec(next(iter(me.ways)).split("/")[0])
    problem = Problem(spec)
    with me.layer(spec) as layer:
        experts = me.experts(problem, layer.placement.local_experts(me.rank))
        case = me.case(problem, 8, "uniform", me.rank)
        me.run(layer, case, experts)
        x, ids, weights = case
        wrong = (x[:, :-1].copy(), ids, weights) if me.rank == 1 else case

        def call() -> None:
            me.run(layer, wrong, experts)
            me.run(layer, wrong, experts)  # on a GPU the call before may have ended in failure after it returned

        told = _error(call)
        me.comm.reset()
        error = relative_error(me.run(layer, case, experts), problem.reference(*case))
    return {"told": told, "error": error, "bound": 5e-3}


def different_calls(me: Rank) -> Any:
    """Rank 0 calls one layer where the others call another: everybody is told which, and after reset() all is well."""
    spec = me.spec(next(iter(me.ways)).split("/")[0])
    problem = Problem(spec)
    layers = [me.layer(spec), me.layer(spec)]
    experts = me.experts(problem, layers[0].placement.local_experts(me.rank))
    case = me.case(problem, 8, "uniform", me.rank)
    for layer in layers:
        me.run(layer, case, experts)
    told = _error(lambda: me.run(layers[0 if me.rank == 0 else 1], case, experts))
    me.comm.reset()
    error = relative_error(me.run(layers[1], case, experts), problem.reference(*case))
    for layer in layers:
        layer.close()
    return {"told": told, "error": error, "bound": 5e-3}


def dies(me: Rank) -> Any:
    """Rank 1 is killed between two calls; run it last. The others say who is missing."""
    spec = me.spec(next(iter(me.ways)).split("/")[0])
    problem = Problem(spec)
    layer = me.layer(spec)
    experts = me.experts(problem, layer.placement.local_experts(me.rank))
    case = me.case(problem, 8, "uniform", me.rank)
    for n in range(30):
        if n == 20 and me.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        told = _error(lambda: me.run(layer, case, experts))
        if told["type"]:
            break
    me.comm.close(abort=True)
    return {"told": told}


GROUPS = {work.__name__: work for work in (
    bounds, placements, invariant, graphs, many, delays, two_layers, bad_input, different_calls, dies,
)}  # fmt: skip


def main() -> None:
    folder, target, *groups = sys.argv[1:]
    start = time.monotonic()
    results: dict[str, Any] = {}
    failed = False
    me = Rank(target)
    try:
        me.build(groups)
        results["build_seconds"] = round(time.monotonic() - start, 2)
        for name in groups:
            begun = time.monotonic()
            results[name] = GROUPS[name](me)
            results[name + "_seconds"] = round(time.monotonic() - begun, 2)
        me.comm.close(abort="dies" in groups)
    except BaseException:
        failed = True
        results["error"] = traceback.format_exc()
        print(f"rank {me.rank}: {results['error']}", file=sys.stderr, flush=True)
        me.comm.close(abort=True)
    results["seconds"] = round(time.monotonic() - start, 2)
    Path(folder, f"rank{me.rank}.json").write_text(json.dumps(results, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
