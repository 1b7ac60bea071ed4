"""``demo``: the main job from end to end on this machine, at a real model's shape, checked against the reference."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer
from rich.markup import escape
from threadpoolctl import threadpool_limits

from ..arch import GPU_ARCHS
from ..cache import CompiledKernel
from ..errors import SpecError
from ..launch.cuda import CudaTarget, device_name
from ..launch.host import HostTarget
from ..plan import resolve_combine
from ..programs import plan_kernel
from ..render import KernelSource, generate
from ..spec import MAX_TOKENS, MoESpec
from ..tile import Combine, Schedule, TileConfig
from . import console
from .build import build, layer
from .checks import Call, Check, World, check_outputs, check_routes, check_same, joined, output_bound, uneven
from .console import JsonFlag, size
from .options import SetOption, checked_target, layer_fields, request
from .problem import Problem, random_problem, ranks_of, require_memory, runtime_bytes, weight_bytes


def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model by name; see generate --help.")
    ] = "qwen3-30b-a3b",
    ranks: Annotated[
        int, typer.Option("--ranks", "-r", min=1, max=8, help="Ranks: threads of this process, or streams of one GPU.")
    ] = 2,
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="Tokens of each rank.")] = 64,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Fewer experts than the model has.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="[host|cuda]", help="Where to run: on this machine, or on its current GPU.",
            show_default="FLASHMOE_TARGET, else host",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and tokens.")] = 0,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Plan, generate, compile, run and check one MoE layer of a real model, with random weights."""
    chosen = checked_target(target, "host")
    asked = request(model, None, set_, fixed=layer_fields(tokens, ranks, experts))
    if asked.instrument.code:
        raise SpecError(f"--set {next(iter(asked.instrument.code))} is not valid for demo. See flashmoe-gen trace.")
    if tokens * ranks > MAX_TOKENS:
        raise SpecError(f"--tokens {tokens} is not valid with {ranks_of(asked.spec)}. All together must be at most {MAX_TOKENS}.")
    where = CudaTarget() if chosen == "cuda" else HostTarget()
    sets = [f"--set={text}" for text in set_ or [] if text.partition("=")[0] in vars(asked.spec)]
    command = shlex.join(["flashmoe-gen", "compile", "--model", model, *sets, "--arch", "all"])
    report = _Demo(model, asked.spec, asked.tile_for(where.arch), asked.schedule, where, seed, command, quiet=json_)
    result = report.run()
    if json_:
        console.print_json(result)
    if not result["passed"]:
        raise typer.Exit(1)


class _Demo:
    """One run of the demo; prints as it goes, unless ``quiet``."""

    def __init__(
        self,
        model: str,
        spec: MoESpec,
        tile: TileConfig,
        schedule: Schedule,
        target: HostTarget | CudaTarget,
        seed: int,
        command: str,
        *,
        quiet: bool,
    ) -> None:
        self.command = command  # which compiles its kernels for GPUs
        self.model, self.spec, self.seed, self.quiet = model, spec, seed, quiet
        self.tile, self.schedule = tile, schedule
        self.target, self.arch, self.gpu = target, target.arch, target.name == "cuda"
        self.device = device_name() if self.gpu else target.device
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._require_memory()
        plan = self._plan()
        kernels = self._kernels()
        self._require_memory()  # again: compiling took time, and others may have taken memory
        with self._timed("weights", f"making {size(weight_bytes(self.spec))} of random weights"):
            problem = random_problem(self.spec, self.seed)
        ranks, checks = self._run_and_check(problem)
        gpu = [] if self.gpu else self._gpu_kernels()
        passed = all(check.passed for check in checks)
        total = time.perf_counter() - start
        if not self.quiet:
            word = "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"
            failed = sum(not check.passed for check in checks)
            verdict = f"all {len(checks)} checks" if passed else f"{failed} of {len(checks)} checks failed"
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
            console.say(f"\n{word}  {verdict} in {total:.1f} s ({spent})")
        return {
            "passed": passed,
            "target": self.target.name,
            "device": self.device,
            "model": self.model,
            "spec": dataclasses.asdict(self.spec),
            "tile": self.tile.text_fields(),
            "schedule": dataclasses.asdict(self.schedule),
            "plan": plan,
            "kernels": kernels,
            "ranks": ranks,
            "checks": [dataclasses.asdict(check) for check in checks],
            "gpu_kernels": gpu,
            "seconds": {**self.seconds, "total": total},
        }

    @contextmanager
    def _timed(self, name: str, text: str | None = None) -> Iterator[None]:
        start = time.perf_counter()
        with console.step(text) if text is not None else nullcontext():
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _plan(self) -> dict[str, Any]:
        spec, numbers = self.spec, plan_kernel(self.spec, self.tile, self.arch)
        memory = runtime_bytes(spec, self.tile, self.schedule, self.target)
        plan = {
            **{f"{phase.name}_tiles": phase.tiles for phase in numbers.phases},
            "tasks_per_block": numbers.tasks,
            "weight_bytes": weight_bytes(spec),
            "heap_bytes_per_rank": memory.heap,
            "scratch_bytes_per_rank": memory.scratch,
            "layer_bytes_per_rank": memory.layer,
        }
        if not self.quiet:
            groups = f", {spec.top_groups} of {spec.num_groups} groups" if spec.num_groups > 1 else ""
            renormalized = ", renormalised" if spec.renormalize else ""
            tiles = " + ".join(f"{phase.tiles} {phase.name.upper()}" for phase in numbers.phases)
            rows = [
                (
                    "tokens",
                    f"{spec.max_tokens} on each of {ranks_of(spec)}, hidden_size {spec.hidden_size}, {spec.dtype}",
                ),
                (
                    "experts",
                    f"{spec.num_experts}, {spec.mlp} {spec.activation}, intermediate_size {spec.intermediate_size}",
                ),
                ("router", f"top {spec.top_k} of {spec.scoring} scores{groups}{renormalized}"),
                (
                    "M-block",
                    f"{self.tile.block_m} rows: {tiles} = {numbers.tasks} tasks",
                ),
                ("weights", size(weight_bytes(spec))),
                ("heap", f"{size(memory.heap)} a rank, for all layers (symmetric: what other ranks write into)"),
                ("scratch", f"{size(memory.scratch)} a rank, for all layers; {size(memory.layer)} more for each layer"),
            ]
            console.pairs(f"{self.model}: spec and plan", rows)
        return plan

    def _require_memory(self) -> None:
        require_memory(self.spec, self.tile, self.schedule, self.target, self._alone())

    def _kernels(self) -> list[dict[str, Any]]:
        with self._timed("compile"):
            jobs = layer(self.spec, self.arch, self.tile)
            built = list(zip(jobs, build(jobs)))
        found = [(job.source, kernel) for job, kernel in built if job.source is not None]
        if not self.quiet:
            rows = [
                (source.name, source.digest[:12], len(source.text.splitlines()), _build_time(kernel))
                for source, kernel in found
            ]
            title = f"GPU kernels ({self.arch})" if self.gpu else "Host kernels"
            console.table(f"\n{title}", ["kernel", "digest", "lines", "compiled"], rows)
        return [
            {**_described(source), "seconds": kernel.seconds, "from_cache": kernel.from_cache, "path": kernel.path}
            for source, kernel in found
        ]

    def _run_and_check(self, problem: Problem) -> tuple[list[dict[str, Any]], list[Check]]:
        spec, there = self.spec, problem
        if self.gpu:
            with self._timed("weights", "copying the weights to the GPU"):
                there = problem.on_gpu()
        with World(there, self.tile, self.schedule, gpu=self.gpu) as world:
            with self._timed("run", f"running {ranks_of(spec)}"):
                first = world.run(problem.tokens)
            with self._timed("run", "running again"):
                second = world.run(problem.tokens)
            with self._timed("run", "running with uneven tokens"):
                fewer = world.run(uneven(problem.tokens))
        # One BLAS thread: more of them gain nothing on a few rows, and wait for each other when cores are busy.
        with self._timed("reference", "computing the float64 reference"), threadpool_limits(1, "blas"):
            routes, router_errors = check_routes(problem, first)
            outputs, errors = check_outputs(problem, first, self._bound())
        counts = ", ".join(str(len(call.x)) for call in fewer)
        checks = [
            routes,
            outputs,
            check_same("a second run gives the same bits", "all ids, weights and y", second, first),
            check_same(f"uneven ranks ({counts} tokens) give the same bits", "and every rank returns", fewer, first),
        ]
        # A capacity counts per source rank, and rows summed by their owner are rounded per rank.
        if spec.capacity is None and self._combine() == "route":
            alone = World(there, self.tile, self.schedule, self._alone(), gpu=self.gpu)
            with alone as one, self._timed("run", "running on one rank"):
                together = one.run([joined(first).x])
            name = "one rank with all experts and tokens gives the same bits"
            checks.append(check_same(name, "all ids, weights and y", together, [joined(first)]))
        ranks = [_rank_row(rank, *row) for rank, row in enumerate(zip(first, second, router_errors, errors))]
        if not self.quiet:
            self._show_run(ranks, checks)
        return ranks, checks

    def _combine(self) -> Combine:
        return resolve_combine(self.spec, self.schedule)

    def _alone(self) -> MoESpec:
        return self.spec.replace(world_size=1, max_tokens=self.spec.world_size * self.spec.max_tokens)

    def _bound(self) -> float:
        return output_bound(self.spec, self.tile, gpu=self.gpu)

    def _show_run(self, ranks: list[dict[str, Any]], checks: list[Check]) -> None:
        rows = [
            (
                r["rank"], r["tokens"], r["routes"], r["rows"], r["blocks"], r["padding"], r["blocks"] * self._tasks(),
                f"{r['router_error']:.1e}", f"{r['error']:.2e}", self._duration(r["second_layer_seconds"]),
            )
            for r in ranks
        ]  # fmt: skip
        columns = "rank,tokens,routes,rows,M-blocks,padding,tasks,router error,error of y,second call".split(",")
        where = self.device if self.gpu else "the host"
        times = "; times: CUDA events" if self.gpu else ""
        errors = f"errors: relative L2 against float64; bound of y {self._bound():.0e}"
        console.table(f"\nRun on {where} ({errors}{times})", columns, rows)
        console.say("\n[bold]Checks[/]")
        for check in checks:
            console.say(f"[{'green]PASS' if check.passed else 'bold red]FAIL'}[/]  {check.name}: {check.detail}")

    def _duration(self, seconds: float) -> str:
        return f"{1e3 * seconds:.2f} ms" if self.gpu else f"{seconds:.2f} s"

    def _tasks(self) -> int:
        return plan_kernel(self.spec, self.tile, self.arch).tasks

    def _gpu_kernels(self) -> list[dict[str, Any]]:
        """What generate() gives for the same spec and each GPU architecture; nothing is compiled here."""
        archs = GPU_ARCHS
        with self._timed("GPU texts", "generating the GPU kernels"):
            found = []
            for arch in archs:
                source = generate(self.spec, arch=arch)
                metadata, numbers = (
                    source.metadata["tile"],
                    plan_kernel(self.spec, TileConfig(**source.metadata["tile"]), arch),
                )
                tile = f"{metadata['block_m']} x {metadata['block_n']} x {metadata['block_k']}"
                found.append({**_described(source), "tile": tile, "shared_bytes": numbers.shared_bytes})
        if not self.quiet:
            rows = [(k["name"], k["digest"][:12], k["lines"], k["tile"], size(k["shared_bytes"])) for k in found]
            columns = ["kernel", "digest", "lines", "tile", "shared memory"]
            console.table("\nThe same layer for GPUs (generated, not run)", columns, rows)
            console.say(f"Compile them, without a GPU: {escape(self.command)}")
        return found


def _build_time(kernel: CompiledKernel) -> str:
    return "from the cache" if kernel.from_cache else f"in {kernel.seconds:.1f} s"


def _described(source: KernelSource) -> dict[str, Any]:
    lines = len(source.text.splitlines())
    return {"name": source.name, "arch": source.arch, "digest": source.digest, "lines": lines}


def _rank_row(rank: int, first: Call, second: Call, router_error: float, error: float) -> dict[str, Any]:
    return {
        "rank": rank,
        "tokens": len(first.x),
        **{name: getattr(first.stats, name) for name in ("routes", "masked", "dropped", "rows", "blocks", "padding")},
        "router_error": router_error,
        "error": error,
        "first_layer_seconds": first.layer_seconds,
        "second_layer_seconds": second.layer_seconds,
        "route_seconds": second.route_seconds,
    }
