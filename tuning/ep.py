"""Times expert parallelism: the layer on all ranks, and beside it one GPU with the same weights and routes.

``mpirun -n 2 python tuning/ep.py OUT.json [--tokens 1,128,4096] [--model NAME ...] [--commit ID]``, or under torchrun; needs a GPU
for each process. ``alone`` is a layer of one rank on each GPU, with the experts that this rank holds and as many tokens: the same
weights are read and the same number of routes computed as with uniform routing on all ranks, but nothing crosses NVLink. (One
GPU does not hold all experts of every model.) Times are medians over graph replays of the slowest rank's; a barrier and a replay
before each one bring the ranks in step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import cupy

import flashmoe_gen as fmg
from flashmoe_gen import bench
from flashmoe_gen.launch.cuda import device_name, driver_version

CALLS = 8  # of a graph
INPUTS = 4


def captured(stream: Any, layer: fmg.MoELayer, experts: fmg.Experts, inputs: list[Any], calls: int) -> Any:
    """A graph of calls with rotating inputs."""
    outs = [cupy.empty_like(x) for x, _, _ in inputs]

    def work() -> None:
        for n in range(calls):
            layer(*inputs[n % len(inputs)], experts, out=outs[n % len(inputs)])

    return bench._captured(stream, work)


def median_us(graph: Any, stream: Any, comm: fmg.comm.Communicator, samples: int, calls: int) -> float:
    """Microseconds per call: the median over samples of the maximum over ranks."""
    times = []
    for _ in range(samples + 1):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        comm.barrier()
        graph.launch(stream)
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(round(1e6 * cupy.cuda.get_elapsed_time(start, end) / calls))
    everyone = comm._transport.exchange(tuple(times[1:]), "timing")
    return statistics.median(map(max, zip(*everyone))) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", default="1,128,4096")
    parser.add_argument("--model", nargs="+", default=list(bench.MODELS), choices=bench.MODELS)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    counts = [int(count) for count in options.tokens.split(",")]
    comm = fmg.comm.init("auto", target="cuda")
    cupy.cuda.Device(comm.device).use()
    stream = cupy.cuda.Stream(non_blocking=True)
    specs = {}
    for name in options.model:
        preset, changes = bench.MODELS[name]
        specs[name] = fmg.MoESpec.preset(preset, max_tokens=max(counts), world_size=comm.world_size, **changes)
    comm.reserve(*specs.values())
    report: dict[str, Any] = {
        "device": device_name(), "driver": driver_version(), "commit": options.commit,
        "command": shlex.join(["tuning/ep.py", *sys.argv[1:]]), "world_size": comm.world_size, "version": fmg.__version__,
        "heap_bytes": comm.heap.bytes, "what": __doc__, "cells": [],
    }  # fmt: skip
    for name, spec in specs.items():
        local = spec.num_experts // comm.world_size
        single = spec.replace(world_size=1, num_experts=local)
        experts = bench._random_weights(single)
        layers = {
            combine: fmg.MoELayer(spec, target="cuda", comm=comm, schedule=fmg.Schedule(combine=combine))
            for combine in ("rank", "route")
        }
        alone = fmg.MoELayer(single, target="cuda")
        for tokens in counts:
            calls = CALLS if tokens < 1024 else INPUTS
            inputs = [bench._random_inputs(spec, tokens, 100 * n + comm.rank) for n in range(INPUTS)]
            mine = [bench._random_inputs(single, tokens, 100 * n + comm.rank) for n in range(INPUTS)]
            cell: dict[str, Any] = {"model": name, "tokens_per_rank": tokens}
            for combine, layer in layers.items():
                graph = captured(stream, layer, experts, inputs, calls)
                cell[f"{combine}_us"] = round(median_us(graph, stream, comm, options.samples, calls), 2)
                layer.check()
            graph = captured(stream, alone, experts, mine, calls)
            cell["alone_us"] = round(median_us(graph, stream, comm, options.samples, calls), 2)
            alone.check()
            cell["ratio"] = round(min(cell["rank_us"], cell["route_us"]) / cell["alone_us"], 3)
            report["cells"].append(cell)
            if comm.rank == 0:
                print(cell, flush=True)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
        report.setdefault("scratch_bytes", {})[name] = comm.scratches.bytes
        for layer in (*layers.values(), alone):
            layer.close()
        del experts
        cupy.get_default_memory_pool().free_all_blocks()
    if comm.rank == 0:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    comm.close()


if __name__ == "__main__":
    main()
