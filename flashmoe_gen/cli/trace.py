"""``trace``: one layer call under the magnifier, as a file for Perfetto and as the few numbers that sum it up."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import __version__, env
from .. import trace as trace_room
from ..errors import FlashMoEError, SpecError
from ..launch.cuda import CudaTarget, device_count, device_name, driver_version
from ..launch.host import HostTarget
from . import console
from .checks import World
from .console import JsonFlag
from .options import SetOption, request
from .problem import Array, random_problem

_MEANING = {
    "total": "the call, us",
    "last_start": "last block or thread has started",
    "listed": "all routes are listed",
    "first_task": "first task is known",
    "first_products": "first matrix products",
    "last_gemm1": "last GEMM1 tile is done",
    "last_gemm2": "last GEMM2 tile is done",
    "arrival_to_products": "from listed to the first products",
    "tail": "from the last GEMM2 tile to the end",
    "busy_percent": "of the time, tracks that run tiles multiply, %",
    "bubble": "between the products of two tiles, median",
    "bubble_90": "the same, 90th percentile",
    "idle_at_end": "from a track's last tile to the last of all, mean",
    "tiles": "tiles",
}


def trace(
    model: Annotated[str, typer.Option("--model", "-m", help="A model by name; see generate --help.")] = "qwen3-30b-a3b",
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="Tokens of each rank.")] = 128,
    ranks: Annotated[int, typer.Option("--ranks", "-r", min=1, max=8, help="Ranks: threads, or streams of one GPU.")] = 1,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Fewer experts than the model has.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="[host|cuda]", help="Default: cuda when there is a GPU.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the trace goes; compressed when it ends in .gz.")
    ] = Path("trace.json"),
    events: Annotated[int, typer.Option("--events", min=1, help="Room for events of each warp or thread.")] = 4096,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and tokens.")] = 0,
    commit: Annotated[str, typer.Option("--commit", help="What the file names as the commit that ran.")] = "unknown",
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Run one layer with time stamps in its kernel; open the file with ui.perfetto.dev or chrome://tracing."""
    chosen = target or env.target() or ("cuda" if device_count() else "host")
    if chosen not in ("host", "cuda"):
        raise SpecError(f"--target {chosen} is not valid. Must be host or cuda.")
    fixed: dict[str, Any] = {"max_tokens": tokens, "world_size": ranks} | (
        {"num_experts": experts} if experts is not None else {}
    )
    asked = request(model, None, set_, **fixed)
    gpu = chosen == "cuda"
    where = CudaTarget() if gpu else HostTarget()
    problem = random_problem(asked.spec, seed)
    instrument = dataclasses.replace(asked.instrument, trace_events=events)
    with World(
        problem.on_gpu() if gpu else problem, asked.tile_for(where.arch), gpu=gpu, instrument=instrument
    ) as world:
        world.run([_other(x) for x in problem.tokens])  # loads, and leaves other experts' weights in the caches
        _take(world)
        world.run(problem.tokens)
        traces = _take(world)
    summaries = [dataclasses.asdict(trace_room.summarize(found)) for found in traces]
    about = {
        "flashmoe_gen": __version__,
        "commit": commit,
        "command": " ".join(["flashmoe-gen", *sys.argv[1:]]),
        "target": chosen,
        "device": f"{device_name()}, driver {driver_version()}" if gpu else "cpu",
        "model": model,
        "spec": dataclasses.asdict(asked.spec),
        "tile": dataclasses.asdict(asked.tile_for(where.arch)),
        "summaries": summaries,
    }
    _write(output, trace_room.chrome(traces) | {"otherData": about})
    if json_:
        console.print_json(about | {"path": output})
        return
    rows = [[_MEANING[name], *(_number(summary[name]) for summary in summaries)] for name in _MEANING]
    console.table(f"{model}, {tokens} tokens, {chosen}", ["us", *(f"rank {rank}" for rank in range(ranks))], rows)
    console.say(f"\n{output}: {sum(map(len, traces))} events; open it with https://ui.perfetto.dev")


def _take(world: World) -> list[Array]:
    return [layer.take_trace() for layer in world.layers]


def _other(x: Array) -> Array:
    return np.ascontiguousarray(x[:, ::-1])


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        if path.suffix == ".gz":
            with gzip.GzipFile(path, "wb", mtime=0) as file:
                file.write(json.dumps(content).encode())
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise FlashMoEError(f"{path} cannot be written: {error}.") from error
