"""Times two trees of this package on one GPU, in turns, and compares them cell by cell.

``python -P tuning/compare.py BEFORE AFTER OUT.json COMMIT_BEFORE COMMIT_AFTER [ROUNDS [BENCH OPTIONS]]`` runs ``flashmoe-gen
bench`` of the package in each tree, in the order before, after, after, before, ...; needs a GPU. A cell's time is the median over
the rounds: times of one tree move by a percent between machines and by less on one, so a ratio says more than two files' times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Cell = tuple[str, str, int]  # layer or router, model, tokens


def bench(tree: str, options: list[str]) -> dict[str, Any]:
    """The JSON of one ``flashmoe-gen bench``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "bench.json")
        command = [sys.executable, "-P", "-m", "flashmoe_gen", "bench", "--output", str(output), *options]
        paths = [tree, *filter(None, [os.environ.get("PYTHONPATH")])]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def cells(result: dict[str, Any]) -> dict[Cell, float]:
    """Microseconds by cell."""
    return {(kind, row["model"], row["tokens"]): row["us"] for kind in ("layer", "router") for row in result[kind]}


def median(runs: list[dict[str, Any]]) -> dict[Cell, float]:
    """The median time of each cell over some runs."""
    return {cell: statistics.median(cells(one)[cell] for one in runs) for cell in cells(runs[0])}


def main(before: str, after: str, path: str, commits: list[str], rounds: int, options: list[str]) -> None:
    """Compare and write ``path``."""
    results: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for number in range(rounds):
        turn = (("before", before), ("after", after))
        for name, tree in turn if number % 2 == 0 else turn[::-1]:
            results[name].append(bench(tree, options))
    medians = {name: median(runs) for name, runs in results.items()}
    rows = [
        {
            "kind": kind,
            "model": model,
            "tokens": tokens,
            "before_us": round(medians["before"][kind, model, tokens], 2),
            "after_us": round(us, 2),
            "ratio": round(us / medians["before"][kind, model, tokens], 4),
        }
        for (kind, model, tokens), us in medians["after"].items()
    ]
    ratios = {kind: [row["ratio"] for row in rows if row["kind"] == kind] for kind in ("layer", "router")}
    summary = {
        kind: {"geometric_mean": round(statistics.geometric_mean(found), 4), "worst": max(found), "best": min(found)}
        for kind, found in ratios.items()
        if found
    }
    context = {
        "commits": dict(zip(("before", "after"), commits)),
        "command": " ".join(["python -P tuning/compare.py", *sys.argv[1:]]),
        "rounds": rounds,
        "ceilings": results["after"][-1]["ceilings"],
        "host_us_per_call": {name: [round(one["host_us_per_call"], 1) for one in runs] for name, runs in results.items()},
    }
    Path(path).write_text(json.dumps({**context, "summary": summary, "cells": rows}, indent=1) + "\n")
    print(json.dumps({**summary, "host_us_per_call": context["host_us_per_call"]}, indent=1))
    for row in rows:
        if row["ratio"] > 1.01:
            print(row)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:6], int(sys.argv[6]) if len(sys.argv) > 6 else 2, sys.argv[7:])
