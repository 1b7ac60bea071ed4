"""A layer filled with random numbers at a model's real shape, made in seconds and within the memory that is free."""

from __future__ import annotations

import dataclasses
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import FlashMoEError, SpecError
from ..experts import Experts
from ..fused import launch_shape
from ..launch.target import Target
from ..layout import HeapLayout, HeapNeeds, ScratchLayout, layer_regions, total_bytes
from ..plan import plan_schedule, resolve_combine
from ..programs import plan_kernel
from ..spec import MoESpec, Placement
from ..tile import Schedule, TileConfig
from . import console
from .build import run_all
from .memory import available_bytes

Array = np.ndarray[Any, Any]

# Python, NumPy and the compiler; on a GPU kernels. Beside it a part of all, for page tables, and for what others take meanwhile.
_SPARE_BYTES = 256 << 20
_SPARE_PART = 16
_FILLERS = 8  # most threads that make weights
_ROOT_MEAN_SQUARE = math.sqrt(7 / 3 * 85 / 4)  # of a mantissa in [1, 2) times 1, 2, 4 or 8


@dataclass(frozen=True)
class Problem:
    """Weights of all experts in global order, of the router, and tokens for every rank."""

    spec: MoESpec
    weights: dict[str, Array]
    router_weight: Array
    tokens: list[Array]

    def experts(self, placement: Placement, rank: int) -> Experts:
        """The weights of one rank's experts, without a copy: the default placement holds blocks of experts."""
        held = placement.local_experts(rank)
        first = held[0] if held else 0
        arrays: dict[str, Any] = {name: array[first : first + len(held)] for name, array in self.weights.items()}
        return Experts(**arrays)

    def on_gpu(self) -> Problem:
        """The same with all weights in the memory of the current GPU; tokens stay where they are."""
        weights = {name: _on_gpu(array) for name, array in self.weights.items()}
        return dataclasses.replace(self, weights=weights, router_weight=_on_gpu(self.router_weight))


def _on_gpu(array: Array) -> Any:
    """Not cupy.asarray: that takes pinned memory as large as the array on its way."""
    import cupy

    copy = cupy.empty(array.shape, array.dtype)
    copy.set(array)
    return copy


def weight_shapes(spec: MoESpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the expert weights, by the names of :class:`~flashmoe_gen.Experts`."""
    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"up": (experts, inner, hidden), "down": (experts, hidden, inner)}
    if spec.mlp == "gated":
        shapes = {"gate": shapes["up"], **shapes}
    if spec.bias:
        shapes |= {f"{name}_bias": shape[:2] for name, shape in list(shapes.items())}
    return shapes


def weight_bytes(spec: MoESpec) -> int:
    """Bytes of the weights of all experts."""
    return sum(math.prod(shape) for shape in weight_shapes(spec).values()) * spec.element.size


def ranks_of(spec: MoESpec) -> str:
    """How many ranks, in words."""
    return "1 rank" if spec.world_size == 1 else f"{spec.world_size} ranks"


@dataclasses.dataclass(frozen=True)
class RuntimeBytes:
    """What layers take on the rank that holds most experts, beside their weights.

    Attributes:
        heap: of the communicator: symmetric, other ranks write into it.
        scratch: of the communicator, on this rank alone.
        layer: of each layer.
    """

    heap: int
    scratch: int
    layer: int

    @property
    def all(self) -> int:
        """With one layer."""
        return self.heap + self.scratch + self.layer


def planned_bytes(
    spec: MoESpec, tile: TileConfig, schedule: Schedule, arch: str, *, processors: int, workers: int, system_workers: int,
    trace_events: int = 0,
) -> RuntimeBytes:  # fmt: skip
    """For launches of so many processors, by so many threads or blocks, some of which are of the operating system alone."""
    local = len(Placement.default(spec.num_experts, spec.world_size).local_experts(0))
    plan, combine = plan_kernel(spec, tile, arch), resolve_combine(spec, schedule)
    order = plan_schedule(spec, tile, plan, schedule, combine=combine, local_experts=local, processors=processors)
    scratch = ScratchLayout.of(spec, tile, plan, order, local_experts=local, planners=workers - system_workers)
    own = total_bytes(layer_regions(workers * plan.tracks, trace_events)) + 4 * (2 * spec.num_experts + spec.world_size + 1)
    return RuntimeBytes(HeapLayout.of(HeapNeeds.of(spec), spec.world_size).bytes, scratch.needs.bytes, own)


def runtime_bytes(
    spec: MoESpec, tile: TileConfig, schedule: Schedule, target: Target, trace_events: int = 0
) -> RuntimeBytes:
    """A GPU's kernel is not there yet: it is taken to have the blocks that its registers are planned for."""
    processors, workers = target.expected(launch_shape(spec, tile, target.arch), spec.world_size)
    return planned_bytes(
        spec, tile, schedule, target.arch, processors=processors, workers=workers, system_workers=target.system_workers,
        trace_events=trace_events,
    )  # fmt: skip


def working_bytes(spec: MoESpec) -> int:
    """Bytes that making, running and checking a problem takes beside the weights, the heaps and the workspaces.

    Counted from above: tokens and outputs of all runs, and either what makes the weights or what the float64 reference holds:
    all tokens, and one expert with its rows.
    """
    tokens, hidden, inner = spec.world_size * spec.max_tokens, spec.hidden_size, spec.intermediate_size
    kept = tokens * (8 * hidden * spec.element.size + 32 * spec.top_k)
    rows = min(tokens, 2 * -(-tokens * spec.top_k // spec.num_experts))
    reference = 8 * (tokens * (3 * hidden + 4 * spec.num_experts) + 2 * inner * hidden + rows * (4 * inner + 2 * hidden))
    making = 2 * _fillers() * inner * hidden * spec.element.size
    return kept + max(reference, making)


def _fillers() -> int:
    return min(_FILLERS, os.cpu_count() or 1)


def free_gpu_bytes() -> int:
    """Free memory of the current GPU."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free)


def require_memory(
    spec: MoESpec,
    tile: TileConfig,
    schedule: Schedule,
    target: Target,
    *also: MoESpec,
    trace_events: int = 0,
    held: int = 0,
) -> None:
    """Return if there is memory for the problem, for its layers and for those of other specs, here and on the GPU; and to spare.

    ``held`` bytes of it have been taken already.

    Raises:
        FlashMoEError: there is not; says how many experts would fit.
    """
    layers = sum(one.world_size * runtime_bytes(one, tile, schedule, target, trace_events).all for one in (spec, *also))
    needed = weight_bytes(spec) + working_bytes(spec)
    memory = available_bytes()
    on_host = target.device == "cpu"
    if memory is not None:
        _require(spec, needed + (layers if on_host else 0), memory + held, "memory")
    if not on_host:
        _require(spec, needed + layers, free_gpu_bytes() + held, "GPU memory")


def _require(spec: MoESpec, needed: int, available: int, what: str) -> None:
    wanted = needed + needed // _SPARE_PART + _SPARE_BYTES
    if wanted <= available:
        return
    weights = weight_bytes(spec)
    left = (available - _SPARE_BYTES) * _SPARE_PART // (_SPARE_PART + 1) - (needed - weights)
    fitting = _fewer_experts(spec, left * spec.num_experts // weights)
    if weights < needed // 2:
        advice = "Try fewer --tokens."
    else:
        advice = f"Try --experts {fitting}." if fitting else "Try a smaller model."
    raise FlashMoEError(
        f"This needs {console.size(wanted)} of {what}, of which {console.size(weights)} for the weights of "
        f"{spec.num_experts} experts; {console.size(available)} are free. {advice}"
    )


def _fewer_experts(spec: MoESpec, most: int) -> int:
    """The largest number of experts up to ``most`` that the spec can have, a multiple of 8 if there is one; 0: none."""
    counts = range(min(most, spec.num_experts - 1), 0, -1)
    for count in (*(count for count in counts if count % 8 == 0), *counts):
        with suppress(SpecError):
            return spec.replace(num_experts=count).num_experts
    return 0


def random_problem(spec: MoESpec, seed: int) -> Problem:
    """Random weights that keep the size of what passes through them, and ``max_tokens`` random tokens for each rank."""
    dtype = spec.element.numpy
    arrays = {name: np.empty(shape, dtype) for name, shape in weight_shapes(spec).items()}
    jobs = [(name, expert) for name in arrays for expert in range(spec.num_experts)]

    def fill(job: tuple[int, tuple[str, int]]) -> None:
        number, (name, expert) = job
        array = arrays[name]
        scale = 0.25 if name.endswith("_bias") else 1 / math.sqrt(array.shape[-1])
        array[expert] = random_values(array.shape[1:], dtype, scale, (seed, 1, number))

    run_all(fill, enumerate(jobs), _fillers())
    hidden = spec.hidden_size
    router = random_values((spec.num_experts, hidden), dtype, 1 / math.sqrt(hidden), (seed, 2))
    tokens = [random_values((spec.max_tokens, hidden), dtype, 1.0, (seed, 3, rank)) for rank in range(spec.world_size)]
    return Problem(spec, arrays, router, tokens)


def random_values(shape: tuple[int, ...], dtype: np.dtype[Any], scale: float, seed: tuple[int, ...]) -> Array:
    """Random numbers of about a given root mean square, made from bits because that is fast.

    Sign, mantissa and two bits of the exponent are random, so magnitudes span four powers of two.
    """
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    word = np.dtype(f"u{dtype.itemsize}")
    mantissa, bias = int(info.nmant), int(info.maxexp) - 1
    count = math.prod(shape)
    generator = np.random.Generator(np.random.SFC64(seed))
    random = generator.integers(0, 2**64 - 1, size=-(-count * dtype.itemsize // 8), dtype=np.uint64, endpoint=True)
    bits = random.view(word)[:count]
    bits &= word.type(1 << (8 * dtype.itemsize - 1) | (1 << mantissa + 2) - 1)
    bits += word.type((bias + round(math.log2(scale / _ROOT_MEAN_SQUARE))) << mantissa)
    return bits.view(dtype).reshape(shape)
