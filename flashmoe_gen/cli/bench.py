"""``bench``: the layer and the router on this machine's GPU, beside the floor of its measured ceilings."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__, files
from .. import bench as bench_room
from ..errors import SpecError
from ..launch.cuda import CudaTarget
from ..programs import default_tile
from ..spec import MoESpec
from . import console
from .console import JsonFlag


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"Repeatable; default: {', '.join(bench_room.MODELS)}.", show_default=False),
    ] = None,
    tokens: Annotated[
        str, typer.Option("--tokens", "-t", help="Token counts, separated by commas.")
    ] = ",".join(map(str, bench_room.TOKENS)),
    program: Annotated[
        str | None, typer.Option("--program", help="Block program, such as wgmma or mma; default: the GPU's best.")
    ] = None,
    router: Annotated[bool, typer.Option("--router/--no-router", help="Time the router too.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file, after every model.", show_default=False)
    ] = None,
    commit: Annotated[str, typer.Option("--commit", help="What the JSON names as the commit that ran.")] = "unknown",
    json_: JsonFlag = False,
) -> None:
    """Time the layer: CUDA-graph replay, rotating random inputs, medians; needs a GPU."""
    if output is not None:
        files.require_writable(output)
    counts = _counts(tokens)
    names = model or list(bench_room.MODELS)
    specs = {name: _spec(name, max(counts)) for name in names}
    arch = CudaTarget().arch
    tiles = {name: default_tile(spec, arch, program) for name, spec in specs.items()}
    with console.step("measuring the ceilings of this GPU"):
        ceilings = bench_room.measure_ceilings()
    console.note(
        f"{ceilings.device}, driver {ceilings.driver}: matmul {ceilings.matmul_tflops:.0f} TFLOP/s, "
        f"read {ceilings.read_gbs:.0f} GB/s"
    )
    with console.step(f"{names[0]}: timing what a call keeps the host"):
        host_us = bench_room.bench_host(specs[names[0]])
    console.note(f"{names[0]}: a call keeps the host {host_us:.1f} us")
    layers, routers = [], []
    context = {
        "version": __version__, "commit": commit, "command": shlex.join(["flashmoe-gen", *sys.argv[1:]]), "program": program,
        "host_us_per_call": host_us,
    }  # fmt: skip
    for name, spec in specs.items():
        with console.step(f"{name}: timing the layer"):
            for timing in bench_room.bench_layer(name, spec, counts, ceilings, tile=tiles[name]):
                layers.append(timing)
                console.note(f"{name}, {timing.tokens} tokens: {timing.us:.1f} us, {timing.percent_of_floor:.0f} % of the floor")
        with console.step(f"{name}: timing the router") if router else nullcontext():
            for routed in bench_room.bench_router(name, spec, counts) if router else ():
                routers.append(routed)
                console.note(f"{name}, router, {routed.tokens} tokens: {routed.us:.1f} us")
        result = bench_room.report(ceilings, layers, routers, **context)
        if output is not None:  # after every model: who stops a long run keeps what it measured
            files.write_text(output, json.dumps(result, indent=1) + "\n")
    if json_:
        console.print_json(result)
        return
    columns = ["model", "tokens", "us", "floor us", "% of floor", "TFLOP/s", "router us"]
    by_cell = {(routed.model, routed.tokens): f"{routed.us:.1f}" for routed in routers}
    rows: list[list[Any]] = [
        [t.model, t.tokens, f"{t.us:.1f}", f"{t.floor_us:.1f}", f"{t.percent_of_floor:.0f}", f"{t.tflops:.0f}",
         by_cell.get((t.model, t.tokens), "")]
        for t in layers
    ]  # fmt: skip
    console.table("", columns, rows)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise SpecError(f"--tokens {text!r} is not valid. Must be positive integers separated by commas.")
    return counts


def _spec(name: str, max_tokens: int) -> MoESpec:
    preset, changes = bench_room.MODELS.get(name, (name, {}))
    return MoESpec.preset(preset, max_tokens=max_tokens, **changes)
