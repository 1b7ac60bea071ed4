"""Timing the layer on a GPU, beside the floor that the same machine's measured ceilings give.

A floor is ``max(6 T k H I / matmul rate, bytes of the touched experts and of the tokens / read rate)`` (a vanilla MLP: 4).
Both rates are measured in the same run, because absolute times move with the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .experts import Experts
from .launch.cuda import device_name, driver_version
from .layer import MoELayer
from .spec import MoESpec
from .tile import TileConfig

_READ_KERNEL = r"""
extern "C" __global__ void flashmoe_read_rate(const uint4* data, unsigned long long count, unsigned* out) {
  unsigned folded = 0;
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 v = data[i];
    folded ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (folded == 0x12345678u) *out = folded;
}
"""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run.

    Attributes:
        device: its name.
        driver: version of the kernel module, and of the CUDA it supports.
        matmul_tflops: fp16 8192 x 8192 x 8192 through the vendor's library, in 1e12 FLOP/s.
        read_gbs: reading 4 GiB once, in 1e9 bytes/s.
    """

    device: str
    driver: str
    matmul_tflops: float
    read_gbs: float


@dataclass(frozen=True)
class Timing:
    """One measured cell.

    Attributes:
        model, tokens: what ran.
        us: median time of one call in a replayed CUDA graph, in microseconds.
        best_us, worst_us: fastest and slowest of the samples.
        floor_us: see the module's text.
        percent_of_floor: ``100 * floor_us / us``.
        tflops: useful FLOP/s (padding not counted), in 1e12.
        staged_bytes: bytes of expert rows that the combine writes and reads, which the floor leaves out.
    """

    model: str
    tokens: int
    us: float
    best_us: float
    worst_us: float
    floor_us: float
    percent_of_floor: float
    tflops: float
    staged_bytes: int


@dataclass(frozen=True)
class RouterTiming:
    """One measured cell of the router; fields as in :class:`Timing`."""

    model: str
    tokens: int
    us: float
    best_us: float
    worst_us: float


# The models of the comparison with other implementations: preset and changes. DeepSeek-V3 is one rank's shard.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("qwen3-30b-a3b", {}),
    "deepseek-v2-lite": ("deepseek-v2-lite", {}),
    "llama4-scout": ("llama4-scout", {}),
    "mixtral-8x7b": ("mixtral-8x7b", {}),
    "gpt-oss-20b": ("gpt-oss-20b", {}),
    "deepseek-v3-shard": ("deepseek-v3", {"num_experts": 32}),
}
TOKENS = (1, 32, 128, 512, 2048, 8192)
_ROUTER_CALLS = 10


def _median_us(graphs: Sequence[Any], stream: Any, samples: int, calls: int) -> list[float]:
    """Microseconds per call of each sample, sorted; a graph holds ``calls`` calls."""
    import cupy

    for graph in graphs:
        graph.launch(stream)
    times = []
    for n in range(samples):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graphs[n % len(graphs)].launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(start, end) / calls)
    return sorted(times)


def _captured(stream: Any, work: Callable[[], Any]) -> Any:
    with stream:
        work()
        stream.synchronize()
        stream.begin_capture()
        work()
        return stream.end_capture()


def measure_ceilings() -> Ceilings:
    """Measure the matmul and the read rate of the current GPU."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    a, b = (cupy.random.standard_normal((8192, 8192), dtype=cupy.float32).astype(cupy.float16) for _ in range(2))
    out = cupy.empty((8192, 8192), cupy.float16)
    data = cupy.random.randint(0, 1 << 30, 1 << 30, dtype=cupy.int32)
    sink = cupy.zeros(1, cupy.uint32)
    kernel = cupy.RawKernel(_READ_KERNEL, "flashmoe_read_rate")
    blocks = 16 * int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        cupy.matmul(a, b, out=out)  # makes the library's handle
    def median_us(work: Callable[[], Any]) -> float:
        samples = []
        for _ in range(23):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            with stream:
                start.record(stream)
                work()
                end.record(stream)
            end.synchronize()
            samples.append(1e3 * cupy.cuda.get_elapsed_time(start, end))
        return float(np.median(samples[3:]))

    matmul_us = median_us(lambda: cupy.matmul(a, b, out=out))
    read_us = median_us(lambda: kernel((blocks,), (512,), (data, np.uint64(data.nbytes // 16), sink)))
    return Ceilings(
        device=device_name(),
        driver=driver_version(),
        matmul_tflops=2 * 8192**3 / matmul_us / 1e6,
        read_gbs=data.nbytes / read_us / 1e3,
    )


def _random_weights(spec: MoESpec) -> Experts:
    import cupy

    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"up": (e, i, h), "down": (e, h, i)}
    if spec.mlp == "gated":
        shapes["gate"] = (e, i, h)
    if spec.bias:
        shapes |= {f"{name}_bias": shape[:2] for name, shape in list(shapes.items())}
    weights = {}
    for name, shape in shapes.items():
        weights[name] = cupy.empty(shape, spec.element.numpy)
        for expert in range(e):
            weights[name][expert] = (cupy.random.standard_normal(shape[1:], dtype=cupy.float32) / shape[-1] ** 0.5).astype(
                spec.element.numpy
            )
    return Experts(**weights)


def _random_inputs(spec: MoESpec, tokens: int, seed: int) -> tuple[Any, Any, Any]:
    """Tokens and uniform random routes."""
    import cupy

    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, spec.num_experts)), axis=1)[:, : spec.top_k].astype(np.int32)
    weights = rng.random((tokens, spec.top_k)).astype(np.float32)
    x = cupy.random.standard_normal((tokens, spec.hidden_size), dtype=cupy.float32).astype(spec.element.numpy)
    return x, cupy.asarray(ids), cupy.asarray(weights / weights.sum(1, keepdims=True))


def _floor_us(spec: MoESpec, tokens: int, touched: float, ceilings: Ceilings) -> tuple[float, float]:
    matrices = 3 if spec.mlp == "gated" else 2
    size = spec.element.size
    flops = 2.0 * matrices * tokens * spec.top_k * spec.hidden_size * spec.intermediate_size
    expert = matrices * spec.hidden_size * spec.intermediate_size * size
    moved = touched * expert + 2 * tokens * spec.hidden_size * size
    return max(flops / ceilings.matmul_tflops / 1e6, moved / ceilings.read_gbs / 1e3), flops


def bench_layer(
    name: str,
    spec: MoESpec,
    tokens: Sequence[int],
    ceilings: Ceilings,
    *,
    tile: TileConfig | None = None,
    samples: int = 24,
    inputs: int = 4,
) -> Iterator[Timing]:
    """Time the layer at several token counts: CUDA-graph replay over rotating random inputs.

    Args:
        name: label of the results.
        spec: one rank; ``max_tokens`` covers ``tokens``.
        tokens: token counts.
        ceilings: of this run.
        tile: tile configuration; default :func:`flashmoe_gen.default_tile`.
        samples: replays timed per count.
        inputs: different random inputs to rotate over.

    Raises:
        FlashMoEError: as :class:`MoELayer`.
    """
    import cupy

    experts = _random_weights(spec)
    stream = cupy.cuda.Stream(non_blocking=True)
    with MoELayer(spec, target="cuda", tile=tile) as layer:
        for count in tokens:
            cases = [_random_inputs(spec, count, seed) for seed in range(inputs)]
            touched = float(np.mean([len(np.unique(cupy.asnumpy(ids))) for _, ids, _ in cases]))
            out = cupy.empty_like(cases[0][0])
            cupy.cuda.runtime.deviceSynchronize()

            def replay(case: tuple[Any, Any, Any], out: Any = out) -> Any:
                return _captured(stream, lambda: layer(*case, experts, out=out))

            times = _median_us([replay(case) for case in cases], stream, samples, 1)
            layer.check()
            floor, flops = _floor_us(spec, count, touched, ceilings)
            median = float(np.median(times))
            yield Timing(
                model=name,
                tokens=count,
                us=median,
                best_us=times[0],
                worst_us=times[-1],
                floor_us=floor,
                percent_of_floor=100 * floor / median,
                tflops=flops / median / 1e6,
                staged_bytes=2 * count * spec.top_k * spec.hidden_size * spec.element.size,
            )


def bench_router(name: str, spec: MoESpec, tokens: Sequence[int], *, samples: int = 24) -> Iterator[RouterTiming]:
    """Time the router at several token counts: replays of a CUDA graph that holds ten calls.

    Raises:
        FlashMoEError: as :class:`MoELayer`.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    shape = (spec.num_experts, spec.hidden_size)
    weight = (cupy.random.standard_normal(shape, dtype=cupy.float32) / spec.hidden_size**0.5).astype(spec.element.numpy)
    with MoELayer(spec, target="cuda", stream=stream) as layer:
        for count in tokens:
            x, _, _ = _random_inputs(spec, count, 0)
            cupy.cuda.runtime.deviceSynchronize()

            def ten_calls(x: Any = x) -> None:
                for _ in range(_ROUTER_CALLS):
                    layer.route(x, weight)

            times = _median_us([_captured(stream, ten_calls)], stream, samples, _ROUTER_CALLS)
            yield RouterTiming(name, count, float(np.median(times)), times[0], times[-1])


def bench_host(spec: MoESpec, *, calls: int = 20, samples: int = 30) -> float:
    """Microseconds that one call with ``out=`` keeps the host, one token: the median over batches of ``calls``.

    Raises:
        FlashMoEError: as :class:`MoELayer`.
    """
    import cupy

    experts, case = _random_weights(spec), _random_inputs(spec, 1, 0)
    out = cupy.empty_like(case[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    times = []
    with MoELayer(spec, target="cuda", stream=stream) as layer:
        for _ in range(samples + 1):  # the first one loads and encodes
            stream.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                layer(*case, experts, out=out)
            times.append((time.perf_counter() - start) / calls * 1e6)
        layer.check()
    return float(np.median(times[1:]))


def report(
    ceilings: Ceilings, layers: Sequence[Timing], routers: Sequence[RouterTiming], **context: Any
) -> dict[str, Any]:
    """The results as one JSON-ready object; ``context`` says how they came about."""
    return {
        **context,
        "ceilings": asdict(ceilings),
        "layer": [asdict(timing) for timing in layers],
        "router": [asdict(timing) for timing in routers],
    }
