"""What test_sanitizer_gpu.py runs under compute-sanitizer: ``python sanitized.py WAY``, or ``planted`` for planted errors."""

from __future__ import annotations

import sys

import cupy
import numpy as np
from ranks import BOUNDS, Problem, assert_close, device_experts, inputs_of, make

import flashmoe_gen as fmg

PLANTED = r"""
extern "C" __global__ void planted(int* out, int* nowhere) {
  __shared__ int words[64];
  words[threadIdx.x] = int(threadIdx.x);  // no barrier: a race
  out[threadIdx.x] = words[63 - threadIdx.x];
  if (nowhere != nullptr) *nowhere = 1;  // no such memory
}
"""


def planted(tool: str) -> None:
    out = cupy.empty(64, cupy.int32)
    nowhere = np.uintp(64 if tool == "memcheck" else 0)
    cupy.RawKernel(PLANTED, "planted")((1,), (64,), (out, nowhere))
    cupy.cuda.runtime.deviceSynchronize()


def layer_and_router(way: str) -> None:
    spec, tile = make(way)
    problem = Problem(spec)
    experts = device_experts(problem, tuple(range(spec.num_experts)))
    # Few blocks: those that only wait are slow here, and instrumented code may not leave room for all of them.
    with fmg.MoELayer(spec, target="cuda", tile=tile, max_blocks=8) as layer:
        for count in (17, 130):
            (case,) = inputs_of(problem, spec, [count], "uniform", seed=count)
            x, ids, weights = map(cupy.asarray, case)
            y = layer(x, ids, weights, experts)
            layer.check()
            assert_close(problem, case, cupy.asnumpy(y), BOUNDS[way])
        ids, weights = layer.route(x, cupy.asarray(problem.tokens(spec.num_experts, 1)))
        cupy.cuda.runtime.deviceSynchronize()
        assert set(cupy.asnumpy(ids).flat) <= set(range(spec.num_experts))
    print("finished")


if __name__ == "__main__":
    if sys.argv[1] == "planted":
        planted(sys.argv[2])
    else:
        layer_and_router(sys.argv[1])
