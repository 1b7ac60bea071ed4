"""``trace``: one layer call under the magnifier, as a file for Perfetto and as the few numbers that sum it up."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import __version__, files
from .. import trace as trace_room
from ..errors import SpecError, TraceRoomError
from ..instrument import Instrument
from ..launch.cuda import CudaTarget, device_count, device_name, driver_version
from ..launch.host import HostTarget
from . import build, console
from .checks import World
from .console import JsonFlag
from .options import Fixed, Request, SetOption, checked_target, layer_fields, request
from .problem import Array, random_problem, ranks_of, require_memory, weight_bytes

_FIRST_ROOM = 2048
MOST_EVENTS = 1 << 20  # of an Instrument

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
        str | None, typer.Option("--target", metavar="[host|cuda]", help="Where to run.",
                     show_default="FLASHMOE_TARGET, else cuda when there is a GPU")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the trace goes; compressed when it ends in .gz.")
    ] = Path("trace.json"),
    events: Annotated[
        int | None,
        typer.Option(
            "--events", min=1, max=MOST_EVENTS, help="Room for events of each warp or thread.", show_default="for all of them"
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and tokens.")] = 0,
    commit: Annotated[str, typer.Option("--commit", help="What the file names as the commit that ran.")] = "unknown",
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Run one layer with time stamps in its kernel; open the file with ui.perfetto.dev or chrome://tracing."""
    chosen = checked_target(target, "cuda" if device_count() else "host")
    asked = request(model, None, set_, fixed=layer_fields(tokens, ranks, experts) | {"trace_events": Fixed("--events", events)})
    if "trace_events" in asked.chosen and events is None:
        raise SpecError("--set trace_events is not valid for trace. Use --events.")
    files.require_writable(output)
    gpu = chosen == "cuda"
    where = CudaTarget() if gpu else HostTarget()
    traces = _Tracing(asked, where, seed).run(events)
    summaries = [dataclasses.asdict(trace_room.summarize(found)) for found in traces]
    about = {
        "flashmoe_gen": __version__,
        "commit": commit,
        "command": shlex.join(["flashmoe-gen", *sys.argv[1:]]),
        "target": chosen,
        "device": f"{device_name()}, driver {driver_version()}" if gpu else "cpu",
        "model": model,
        "spec": dataclasses.asdict(asked.spec),
        "tile": asked.tile_for(where.arch).text_fields(),
        "schedule": dataclasses.asdict(asked.schedule),
        "summaries": summaries,
    }
    with console.step(f"writing {output}"):
        _write(output, trace_room.chrome(traces) | {"otherData": about})
    if json_:
        console.print_json(about | {"path": output})
        return
    rows = [[_MEANING[name], *(_number(summary[name]) for summary in summaries)] for name in _MEANING]
    console.table(f"{model}, {tokens} tokens, {chosen}", ["us", *(f"rank {rank}" for rank in range(ranks))], rows)
    console.say(f"\n{output}: {sum(map(len, traces))} events; open it with https://ui.perfetto.dev")


class _Tracing:
    """Runs a layer with time stamps."""

    def __init__(self, asked: Request, target: HostTarget | CudaTarget, seed: int) -> None:
        self.spec, self.tile, self.target, self.gpu = asked.spec, asked.tile_for(target.arch), target, target.name == "cuda"
        self.schedule = asked.schedule
        self.instrument, self.where = asked.instrument, "warp" if self.gpu else "thread"
        require_memory(self.spec, self.tile, self.schedule, target, trace_events=_FIRST_ROOM)
        build.build(build.layer(self.spec, target.arch, self.tile, self._traced(1)))
        require_memory(self.spec, self.tile, self.schedule, target, trace_events=_FIRST_ROOM)  # again: compiling took time
        with console.step(f"making {console.size(weight_bytes(self.spec))} of random weights"):
            self.problem = random_problem(self.spec, seed)
        self.there = self.problem.on_gpu() if self.gpu else self.problem

    def run(self, events: int | None) -> list[Array]:
        """The events of each rank's only call. How many there are is known after a call: then it runs again, with room for all.

        Raises:
            SpecError: ``events`` is too small.
        """
        room = events or _FIRST_ROOM
        while True:
            require_memory(self.spec, self.tile, self.schedule, self.target, trace_events=room, held=weight_bytes(self.spec))
            with World(self.there, self.tile, self.schedule, gpu=self.gpu, instrument=self._traced(room)) as world:
                try:
                    with console.step(f"tracing {ranks_of(self.spec)}, with room for {room} events a {self.where}"):
                        world.run([_other(x) for x in self.problem.tokens])  # loads; leaves other experts' weights in the caches
                        _take(world)
                        world.run(self.problem.tokens)
                    return _take(world)
                except TraceRoomError as full:
                    if events is not None or room == MOST_EVENTS:
                        raise SpecError(f"--events {room} is not enough. These calls need {full.needed} a {self.where}.") from None
                    room = min(2 * full.needed, MOST_EVENTS)  # who does what differs from call to call

    def _traced(self, room: int) -> Instrument:
        return dataclasses.replace(self.instrument, trace_events=room)


def _take(world: World) -> list[Array]:
    """Take the events of every rank; the error names what the rank with most of them needs."""
    taken: list[Array] = []
    worst: TraceRoomError | None = None
    for layer in world.layers:
        try:
            taken.append(layer.take_trace())
        except TraceRoomError as full:
            worst = max(worst or full, full, key=lambda error: error.needed)
    if worst is not None:
        raise worst
    return taken


def _other(x: Array) -> Array:
    return np.ascontiguousarray(x[:, ::-1])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _write(path: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, allow_nan=False).encode()
    files.write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
