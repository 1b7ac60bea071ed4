"""Times the ring of the intermediate against L2: per model, how many M-blocks of it are kept, and in panels of how many.

``python tuning/ring.py OUT.json [--model NAME ...] [--tokens 2048,8192] [--bounds 32,40,48] [--commit ID]``; needs a GPU. The
schedule is launch arguments alone, so each model compiles once and its variants take turns: drift of the machine meets all alike.
``unbounded`` is the ring that the lag and the processors ask for, ``default`` what a layer takes by itself.
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
from flashmoe_gen import bench, plan
from flashmoe_gen.launch.cuda import device_name, driver_version

MODELS = ("mixtral-8x7b", "deepseek-v3-shard", "gpt-oss-20b")
PANELS = (1, 2, 4, 6, 8)
INPUTS = 2


def schedules(layer: fmg.MoELayer, bounds: list[int]) -> dict[str, fmg.Schedule]:
    """What to compare with a layer of the default schedule: by what it is, the largest ring first."""
    fused = layer._fused
    slot_bytes = fused.tile.block_m * fused.plan.rows.middle.bytes
    asked = plan._order(layer.spec, fused.tile, fused.plan, fmg.Schedule(), fused.processors)[-1]
    found = {"unbounded": fmg.Schedule(ring=asked), "default": fmg.Schedule()}
    for bound in sorted(bounds, reverse=True):
        ring = min(asked, (bound << 20) // slot_bytes)
        for panel in PANELS:
            schedule = fmg.Schedule(ring=ring, panel=panel) if 2 * panel <= ring else None
            if schedule is not None and panel % fused.tile.cluster == 0 and schedule not in found.values():
                found[f"{bound} MiB, panel {panel}"] = schedule
    return found


def cells(name: str, tokens: list[int], bounds: list[int], samples: int) -> list[dict[str, Any]]:
    """The times of one model."""
    preset, changes = bench.MODELS[name]
    spec = fmg.MoESpec.preset(preset, max_tokens=max(tokens), **changes)
    experts, stream = bench._random_weights(spec), cupy.cuda.Stream(non_blocking=True)
    with fmg.comm.init("single") as comm:
        with fmg.MoELayer(spec, target="cuda", comm=comm) as first:
            wanted = schedules(first, bounds)
        layers = {what: fmg.MoELayer(spec, target="cuda", comm=comm, schedule=given) for what, given in wanted.items()}
        found = []
        for count in tokens:
            cases = [bench._random_inputs(spec, count, seed) for seed in range(INPUTS)]
            out = cupy.empty_like(cases[0][0])
            cupy.cuda.runtime.deviceSynchronize()

            def captured(layer: fmg.MoELayer, case: Any, out: Any = out) -> Any:
                return bench._captured(stream, lambda: layer(*case, experts, out=out))

            graphs = {what: [captured(layer, case) for case in cases] for what, layer in layers.items()}
            times: dict[str, list[float]] = {what: [] for what in layers}
            for n in range(samples + 1):  # the first round warms up
                for what, each in graphs.items():
                    start, end = cupy.cuda.Event(), cupy.cuda.Event()
                    start.record(stream)
                    each[n % INPUTS].launch(stream)
                    end.record(stream)
                    end.synchronize()
                    if n:
                        times[what].append(1e3 * cupy.cuda.get_elapsed_time(start, end))
            for what, layer in layers.items():
                layer.check()
                order = layer._fused.order(layer.local_experts)
                found.append({
                    "model": name, "tokens": count, "what": what, "ring": order.ring_slots, "panel": order.max_panel,
                    "lag": order.lag, "us": round(statistics.median(times[what]), 1),
                    "ring_bytes": order.ring_slots * layer.tile.block_m * layer._fused.plan.rows.middle.bytes,
                })  # fmt: skip
            default = next(each for each in found if (each["tokens"], each["what"]) == (count, "default"))
            for each in found[-len(layers) :]:
                each["of_default"] = round(each["us"] / default["us"], 4)
                print(each, flush=True)
        for layer in layers.values():
            layer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=bench.MODELS)
    parser.add_argument("--tokens", default="2048,8192")
    parser.add_argument("--bounds", default="32,40,48", help="MiB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    tokens, bounds = ([int(word) for word in text.split(",")] for text in (options.tokens, options.bounds))
    report: dict[str, Any] = {
        "device": device_name(), "driver": driver_version(), "commit": options.commit, "version": fmg.__version__,
        "command": shlex.join(["tuning/ring.py", *sys.argv[1:]]), "what": __doc__, "cells": [],
    }  # fmt: skip
    for name in options.model:
        report["cells"] += cells(name, tokens, bounds, options.samples)
        cupy.get_default_memory_pool().free_all_blocks()
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
