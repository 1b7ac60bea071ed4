"""What a call on a GPU costs the host, in microseconds (median, best): the call, packing its arguments, launching alone.

``PYTHONPATH=TREE taskset -c 5 python -P tuning/host_cost.py``; ``spin`` is a fixed loop, by which one sees how fast the core ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

import flashmoe_gen as fmg
from flashmoe_gen import bench


def main() -> None:
    """Measure and print one line."""
    spec = fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=8, num_experts=16)
    experts, case = bench._random_weights(spec), bench._random_inputs(spec, 1, 0)
    out, stream = cupy.empty_like(case[0]), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    layer: Any = fmg.MoELayer(spec, target="cuda", stream=stream)
    packed = layer._placed.pack(*case, experts, out, None)

    def cost(work: Callable[[], Any]) -> tuple[float, float]:
        samples = []
        for _ in range(40):
            stream.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                work()
            samples.append((time.perf_counter() - start) / 20 * 1e6)
        return round(float(np.median(samples)), 1), round(min(samples), 1)

    def launch() -> None:
        layer._target.launch(layer._fused.kernel, packed.args, layer._fused.workers, stream, packed.prepared)

    def spin() -> None:
        total = 0
        for number in range(1000):
            total += number

    pack = cost(lambda: layer._placed.pack(*case, experts, out, None))
    print("call", cost(lambda: layer(*case, experts, out=out)), "pack", pack, "launch", cost(launch), "spin", cost(spin))


if __name__ == "__main__":
    main()
