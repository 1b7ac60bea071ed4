"""Times layers that ``flashmoe-gen bench`` does not: other dtypes, activations and MLPs, and routers with groups.

``PYTHONPATH=TREE python -P tuning/variants.py OUT.json COMMIT`` times the package in TREE; needs a GPU. Run it on two trees in turn
to compare them: medians of CUDA-graph replays move by a percent between machines, and by less on one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import flashmoe_gen as fmg
from flashmoe_gen import bench, default_tile

FEW, SOME = [1, 128, 512, 2048], [1, 32, 128, 512, 2048, 8192]
LAYERS: dict[str, tuple[str, str | None, list[int], dict[str, Any]]] = {
    "qwen3 bfloat16 silu": ("qwen3-30b-a3b", None, FEW, {}),
    "qwen3 float16 silu": ("qwen3-30b-a3b", None, FEW, {"dtype": "float16"}),
    "qwen3 float16 silu, mma": ("qwen3-30b-a3b", "mma", FEW, {"dtype": "float16"}),
    "qwen3 bfloat16 gelu": ("qwen3-30b-a3b", None, FEW, {"activation": "gelu"}),
    "qwen3 bfloat16 gelu_tanh": ("qwen3-30b-a3b", None, FEW, {"activation": "gelu_tanh"}),
    "qwen3 bfloat16 relu, vanilla": ("qwen3-30b-a3b", None, FEW, {"activation": "relu", "mlp": "vanilla"}),
    "qwen3 tf32 silu, 32 experts": ("qwen3-30b-a3b", None, [128, 512], {"dtype": "float32", "num_experts": 32}),
    "gpt-oss-20b": ("gpt-oss-20b", None, SOME, {}),
    "gpt-oss-20b, mma": ("gpt-oss-20b", "mma", [1, 128, 2048], {}),
}
ROUTERS = ("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b")


def main(path: str, commit: str) -> None:
    """Time everything and write it to ``path``."""
    ceilings = bench.measure_ceilings()
    rows: list[dict[str, Any]] = []
    for label, (model, program, counts, fields) in LAYERS.items():
        spec = fmg.MoESpec.preset(model, max_tokens=max(counts), **fields)
        tile = default_tile(spec, "sm_90a", program)  # type: ignore[arg-type]
        rows += [
            {"layer": label, "tokens": timing.tokens, "us": round(timing.us, 2)}
            for timing in bench.bench_layer(label, spec, counts, ceilings, tile=tile)
        ]
    for model in ROUTERS:
        spec = fmg.MoESpec.preset(model, max_tokens=4096)
        rows += [
            {"router": model, "tokens": timing.tokens, "us": round(timing.us, 2)}
            for timing in bench.bench_router(model, spec, [1, 128, 4096])
        ]
    host_us = [round(bench.bench_host(fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=8)), 1) for _ in range(3)]
    result = {"commit": commit, "ceilings": vars(ceilings), "host_us_per_call": host_us, "rows": rows}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:3])
