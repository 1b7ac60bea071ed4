"""A layer filled with random numbers at a model's real shape, made in seconds and within the memory that is free."""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..arch import get_arch
from ..errors import FlashMoEError
from ..experts import Experts
from ..layout import HeapLayout, HeapNeeds, WorkspaceLayout
from ..plan import TileConfig, plan_kernel, resolve_combine
from ..spec import MoESpec, Placement
from . import console
from .memory import available_bytes

Array = np.ndarray[Any, Any]

# Python, NumPy, the compiler, float64 copies of one expert and its rows; on a GPU kernels, tokens and logits.
_SPARE_BYTES = 512 << 20
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


def runtime_bytes(spec: MoESpec, tile: TileConfig, arch: str, processors: int, planners: int) -> tuple[int, int]:
    """Bytes of the symmetric heap and of the workspace, on the rank that holds most experts."""
    local = len(Placement.default(spec.num_experts, spec.world_size).local_experts(0))
    plan = plan_kernel(spec, tile, arch)
    combine = resolve_combine(spec, tile, get_arch(arch))
    workspace = WorkspaceLayout.of(
        spec, tile, plan, combine=combine, local_experts=local, processors=processors, planners=planners
    )
    return HeapLayout.of(HeapNeeds.of(spec, combine), spec.world_size).bytes, workspace.bytes


def free_gpu_bytes() -> int:
    """Free memory of the current GPU."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    return int(free)


def require_memory(spec: MoESpec, needed: int, *, gpu: bool = False) -> None:
    """Return if ``needed`` bytes and some to spare are free: on this machine, or on the current GPU.

    Raises:
        FlashMoEError: they are not; says how many experts would fit.
    """
    available = free_gpu_bytes() if gpu else available_bytes()
    if available is None or needed + _SPARE_BYTES <= available:
        return
    fitting = int((available - _SPARE_BYTES) * spec.num_experts / needed)
    advice = f"Try --experts {max(spec.top_k, fitting // 8 * 8)}." if fitting >= spec.top_k else "Try a smaller model."
    raise FlashMoEError(
        f"This needs {console.size(needed + _SPARE_BYTES)} of {'GPU ' if gpu else ''}memory, of which "
        f"{console.size(weight_bytes(spec))} for the weights of {spec.num_experts} experts; "
        f"{console.size(available)} are free. {advice}"
    )


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

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, enumerate(jobs)))
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
