"""What a call on a GPU costs the host, in microseconds, as JSON: its parts, and three ways to launch the same kernel.

``PYTHONPATH=TREE taskset -c 5 python -P tuning/host_cost.py``; ``spin`` is a fixed loop, by which one sees how fast the core ran.
"""

from __future__ import annotations

import ctypes
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import cupy
import numpy as np

import flashmoe_gen as fmg
from flashmoe_gen import bench
from flashmoe_gen.launch.cuda import device_name, driver_version

SAMPLES, CALLS = 40, 20


def main() -> None:
    """Measure and print."""
    spec = fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=8, num_experts=16)
    experts, case = bench._random_weights(spec), bench._random_inputs(spec, 1, 0)
    out, stream = cupy.empty_like(case[0]), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    layer: Any = fmg.MoELayer(spec, target="cuda", stream=stream)
    target, comm, placed, kernel, blocks = layer._target, layer.comm, layer._placed, layer._fused.kernel, layer._fused.workers
    packed = placed.pack(*case, experts, out, None)
    prepared, config = packed.prepared, kernel.config

    def cost(work: Callable[[], Any]) -> dict[str, float]:
        samples = []
        for _ in range(SAMPLES):
            stream.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            samples.append((time.perf_counter() - start) / CALLS * 1e6)
        return {"median": round(float(np.median(samples)), 2), "best": round(min(samples), 2)}

    def nothing(_: Any = None) -> None:
        pass

    def communicate() -> None:
        called = layer._number, placed.tag
        comm.call(layer._number, lambda: comm.run(target, stream, called, packed.generation, nothing))

    def launch_with_cupy() -> None:
        shape = kernel.shape
        arguments = (prepared.args[0], *prepared._beside)
        kernel.function((blocks,), (shape.threads,), arguments, shape.shared_bytes, stream, config.cooperative)

    raw: Any = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    raw.argtypes = [ctypes.c_void_p] * 4
    layer(*case, experts, out=out)  # sets the blocks and the stream of the configuration, which ctypes only points to
    configured, function = int(config._config.getPtr()), int(config._function)

    def launch_with_ctypes() -> None:
        if raw(configured, function, prepared.parameters, None):
            raise RuntimeError("cuLaunchKernelEx failed through ctypes.")

    parts = {
        "call": cost(lambda: layer(*case, experts, out=out)),
        "pack": cost(lambda: placed.pack(*case, experts, out, None)),
        "comm": cost(communicate),
        "launch": cost(lambda: target.launch(kernel, prepared, blocks, stream)),
    }
    medians = {name: part["median"] for name, part in parts.items()}
    launches = {
        "cuda.bindings": cost(lambda: config.launch(prepared.parameters, blocks, stream.ptr)),
        "cupy": cost(launch_with_cupy),
        "ctypes": cost(launch_with_ctypes),
    }
    layer.check()
    result = {
        "call": parts,
        "rest": round(2 * medians["call"] - sum(medians.values()), 2),
        "launches": launches,
        "spin": cost(lambda: sum(range(1000))),
        "device": f"{device_name()}, driver {driver_version()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("cuda-bindings", "numpy")} | {"cupy": cupy.__version__},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
