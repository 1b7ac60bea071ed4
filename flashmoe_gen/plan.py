"""All arithmetic of a kernel: tile sizes, task counts, thread roles and shared memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .arch import Arch, get_arch
from .dtypes import get_dtype
from .errors import SpecError, UnsupportedError
from .spec import MAX_EXPERTS, MAX_WORLD_SIZE, MoESpec
from .values import choice, integer

Program = Literal["mma", "wgmma"]
_CHOICES = {"math": ("tf32", "ffma"), "program": ("mma", "wgmma"), "combine": ("route", "rank")}

CHUNK_TOKENS = 16  # tokens of one dispatch task: a signal's meaning, so the same for every kernel of a heap
PLANNER_TOKENS = 32  # fewest tokens worth a planner of their own
WARP = 32
_ENOUGH_REGISTERS = 160  # of a thread: the accumulators of a warp's 32 x 64 and everything around them
_PLANNER_BYTES = 4 * (3 * MAX_EXPERTS + 4)  # struct PlannerScratch; the scheduler and the subscriber need less
_DRIVER_BYTES = 1024  # shared memory the driver takes of every block


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles.

    Args:
        block_m: rows of an M-block.
        block_n: output columns of a tile; of a gated GEMM1 half of them are gate, half up.
        block_k: elements per stage of the shared-memory pipeline (GPU).
        stages: depth of that pipeline (GPU).
        warps_m, warps_n: grid of MMA warps over a tile (GPU).
        math: matrix arithmetic of float32: ``"tf32"`` (matrix units, operands rounded to nearest) or ``"ffma"``.
            Other dtypes have one way and take ``None``.
        combine: ``"route"`` returns one row per route, ``"rank"`` lets each owner sum its routes of a token first,
            ``None`` picks by target and world size. A launch argument: it does not change the kernel.
        lag: M-blocks whose GEMM1 come between a GEMM1 and its GEMM2 in the task order, ``None``: as many as keep a GEMM2
            from waiting for tiles that have only just been claimed. A launch argument too.
        group: most M-blocks of one expert whose tasks follow each other column by column, so that a weight tile is read
            from memory once; ``None``: several where an expert's weights do not fit L2. A multiple of ``cluster``, or rounded up
            to one. A launch argument too.
        cluster: blocks that take neighbouring M-blocks together and load their weights once for all, or, where there are few
            rows, neighbouring tiles or parts of one; 2 for the wgmma program alone (and for the host, where it only groups tasks).
        program: block program: ``"wgmma"`` (sm_90a, 16-bit dtypes) or ``"mma"`` (any GPU); ``None`` takes wgmma where it runs.

    Raises:
        SpecError: a value is out of range.
    """

    block_m: int
    block_n: int
    block_k: int = 64
    stages: int = 1
    warps_m: int = 1
    warps_n: int = 1
    math: Literal["tf32", "ffma"] | None = None
    combine: Literal["route", "rank"] | None = None
    lag: int | None = None
    group: int | None = None
    cluster: int = 1
    program: Program | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block_m", 1, 256),
            ("block_n", 2, 512),
            ("block_k", 8, 512),
            ("stages", 1, 16),
            ("warps_m", 1, 8),
            ("warps_n", 1, 8),
            ("cluster", 1, 2),
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high, words="an integer"))
        for name, low, high in (("lag", 0, 1024), ("group", 1, 64)):
            if getattr(self, name) is not None:
                value = integer(name, getattr(self, name), low, high, words="None or an integer")
                object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, choice(name, getattr(self, name), choices, also=" or None"))
        if self.block_n % 2:
            raise SpecError(f"block_n={self.block_n} is not valid. Must be even: a gated tile is half gate, half up.")

    def replace(self, **changes: object) -> TileConfig:
        """A copy with some fields changed (validated again)."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def resolve_program(spec: MoESpec, program: Program | None, arch: Arch) -> Program | None:
    """The block program of a kernel; ``None`` on the host, which has one.

    Raises:
        UnsupportedError: the program does not exist for this arch or dtype.
    """
    has_wgmma = arch.name == "sm_90a" and get_dtype(spec.dtype).size == 2
    if arch.is_host and program is not None:
        raise UnsupportedError(f"program={program!r} is not supported on 'host'. Supported: None.")
    if program == "wgmma" and not has_wgmma:
        raise UnsupportedError(
            f"program='wgmma' is not supported for {spec.dtype} on {arch.name!r}. "
            "Supported: bfloat16 and float16 on 'sm_90a'; elsewhere 'mma' or None."
        )
    if program is not None or arch.is_host:
        return program
    return "wgmma" if has_wgmma else "mma"


def default_tile(spec: MoESpec, arch: str, program: Program | None = None) -> TileConfig:
    """The tile used when none is given: right on every arch of its kind, tuned on none.

    Raises:
        UnsupportedError: unknown arch, or no such program there.
    """
    target = get_arch(arch)
    program = resolve_program(spec, program, target)
    if program is None:
        return TileConfig(block_m=32, block_n=64)
    if program == "wgmma":
        return TileConfig(block_m=128, block_n=256, block_k=64, stages=4, warps_m=8, warps_n=1, cluster=2, program=program)
    # Two blocks of four MMA warps overlap each other's epilogues; where only one fits, it has eight.
    warps_n = 2 if target.shared_bytes > 160 * 1024 else 4
    if spec.dtype == "float64":
        return TileConfig(block_m=64, block_n=64, block_k=16, stages=3, warps_m=2, warps_n=warps_n, program=program)
    if spec.dtype == "float32":
        return TileConfig(
            block_m=64, block_n=128, block_k=32, stages=3, warps_m=2, warps_n=warps_n, math="tf32", program=program
        )
    return TileConfig(block_m=64, block_n=128, block_k=64, stages=3, warps_m=2, warps_n=warps_n, program=program)


def resolve_combine(spec: MoESpec, tile: TileConfig, arch: Arch) -> str:
    """How rows come back: forced by batch invariance, else the tile's choice, else by target and world size.

    Raises:
        SpecError: ``combine="rank"`` with ``batch_invariant=True``: the owner's sum depends on the placement.
    """
    if spec.batch_invariant and tile.combine == "rank":
        raise SpecError("combine='rank' is not valid with batch_invariant=True. Must be 'route' or None.")
    if tile.combine is not None:
        return tile.combine
    by_route = arch.is_host or spec.batch_invariant or spec.world_size == 1
    return "route" if by_route else "rank"


@dataclass(frozen=True)
class KernelPlan:
    """The numbers of one fused MoE kernel.

    Attributes:
        intermediate_columns: columns of the intermediate made by one GEMM1 tile.
        gemm1_tiles, gemm2_tiles: column tiles per M-block.
        column_words: 32-bit words that hold a bit per part of a GEMM1 tile: a tile has ``cluster`` parts.
        split_rows: most rows of an expert whose tiles the blocks of a cluster split by columns, 0 when they never do.
        threads: threads of a block (GPU), 0 on the host.
        stage_bytes: shared memory of one pipeline stage.
        work_bytes: shared memory of whoever works: the stages, a staged tile, or the planner's and the scheduler's scratch.
        shared_bytes: dynamic shared memory of a block.
        min_blocks: blocks of a multiprocessor that the registers are limited for.
        tensor_boxes: rows of the boxes of the tensor maps of gate and up, and of down; 0 when the kernel takes no maps.
            A box is ``block_k`` elements of that many rows of one expert: what one block of a cluster loads.
        ring_box: rows of a box of the intermediate ring's tensor map.
        loader_registers, consumer_registers: registers of a thread in the two roles of the wgmma program, else 0.
        near_end: stages before the end of a task at which the wgmma program claims the next one.
    """

    intermediate_columns: int
    gemm1_tiles: int
    gemm2_tiles: int
    column_words: int
    split_rows: int
    threads: int
    stage_bytes: int
    work_bytes: int
    shared_bytes: int
    min_blocks: int
    tensor_boxes: tuple[int, int] = (0, 0)
    ring_box: int = 0
    loader_registers: int = 0
    consumer_registers: int = 0
    near_end: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    planner_tokens: int = PLANNER_TOKENS
    max_world_size: int = MAX_WORLD_SIZE

    @property
    def tracks(self) -> int:
        """Warps of a block, one thread on the host: each keeps its own trace."""
        return max(1, self.threads // WARP)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _check_math(spec: MoESpec, tile: TileConfig, arch: Arch) -> None:
    if spec.dtype != "float32":
        if tile.math is not None:
            raise SpecError(f"math={tile.math!r} is not valid for {spec.dtype}. It chooses the arithmetic of float32 alone.")
    elif arch.is_host and tile.math == "tf32":
        raise UnsupportedError("math='tf32' is not supported on 'host', whose float32 is IEEE. Supported: 'ffma' or None.")


def plan_kernel(spec: MoESpec, tile: TileConfig, arch: str) -> KernelPlan:
    """Compute the plan of the fused kernel, or refuse the tile with a reason.

    Raises:
        SpecError: the tile is impossible for this spec.
        UnsupportedError: the tile is impossible on this arch, or the arch is unknown.
    """
    target = get_arch(arch)
    _check_math(spec, tile, target)
    columns = tile.block_n // 2 if spec.mlp == "gated" and not target.is_host else tile.block_n
    gemm1_tiles = _ceil(spec.intermediate_size, columns)
    gemm2_tiles = _ceil(spec.hidden_size, tile.block_n)
    program = resolve_program(spec, tile.program, target)
    block: dict[str, Any] = dict.fromkeys(("threads", "stage_bytes", "work_bytes", "shared_bytes", "min_blocks"), 0)
    if program is not None:
        block = (_plan_wgmma if program == "wgmma" else _plan_mma)(spec, tile, target)
    return KernelPlan(
        intermediate_columns=columns,
        gemm1_tiles=gemm1_tiles,
        gemm2_tiles=gemm2_tiles,
        column_words=_ceil(gemm1_tiles * tile.cluster, 32),
        split_rows=_split_rows(tile, columns, target),
        **block,
    )


def _split_rows(tile: TileConfig, columns: int, arch: Arch) -> int:
    """Half an M-block, a warpgroup's rows on a GPU, when the parts of a tile are still whole steps of its epilogue."""
    step = 2 if arch.is_host else 64  # columns: the host makes two at a time
    splits = tile.cluster > 1 and columns % (tile.cluster * step) == 0 and tile.block_n % (tile.cluster * step) == 0
    return tile.block_m // 2 if splits else 0


def _plan_mma(spec: MoESpec, tile: TileConfig, arch: Arch) -> dict[str, Any]:
    size = get_dtype(spec.dtype).size
    row_bytes = tile.block_k * size
    if row_bytes not in (64, 128):
        raise SpecError(f"block_k={tile.block_k} is not valid for {spec.dtype}. A stage row must be 64 or 128 bytes.")
    if tile.block_m % (16 * tile.warps_m):
        raise SpecError(f"block_m={tile.block_m} is not valid. Must be a multiple of 16 * warps_m = {16 * tile.warps_m}.")
    if tile.block_n % (16 * tile.warps_n):
        raise SpecError(f"block_n={tile.block_n} is not valid. Must be a multiple of 16 * warps_n = {16 * tile.warps_n}.")
    if tile.cluster != 1:
        raise SpecError(f"cluster={tile.cluster} is not valid for program='mma'. Must be 1.")
    warps = tile.warps_m * tile.warps_n
    if warps > 16 or warps % 4:
        raise SpecError(f"warps_m * warps_n = {warps} is not valid. Must be 4, 8, 12 or 16 warps.")
    if tile.stages < 2:
        raise SpecError(f"stages={tile.stages} is not valid on {arch.name}. Must be at least 2.")
    threads = WARP * (warps + 1)  # one warp fetches tasks
    stage_bytes = (tile.block_m + tile.block_n) * row_bytes
    staged_tile = tile.block_m * (tile.block_n + 8) * size  # rows are padded against bank conflicts
    work_bytes = _ceil(max(tile.stages * stage_bytes, staged_tile, _PLANNER_BYTES), 128) * 128
    shared_bytes = work_bytes + 2 * (32 + 12 * tile.block_m) + _sums_bytes(threads)  # struct BlockState
    _check_shared(tile, stage_bytes, shared_bytes, arch)
    return {
        "threads": threads,
        "stage_bytes": stage_bytes,
        "work_bytes": work_bytes,
        "shared_bytes": shared_bytes,
        "min_blocks": _min_blocks(threads // WARP, shared_bytes, arch),
    }


def _plan_wgmma(spec: MoESpec, tile: TileConfig, arch: Arch) -> dict[str, Any]:
    size = get_dtype(spec.dtype).size
    hint = "program='mma' takes other tiles."
    if tile.block_m != 128 or (tile.warps_m, tile.warps_n) != (8, 1):
        raise SpecError(
            f"block_m={tile.block_m} with {tile.warps_m} x {tile.warps_n} warps is not valid for program='wgmma'. "
            f"Must be 128 rows of 8 x 1 warps: two warpgroups with 64 rows each. {hint}"
        )
    gated = spec.mlp == "gated"
    columns = 64 * (2 if gated else 1)  # the epilogue stores 64 columns of the intermediate at a time
    if tile.block_n % columns or tile.block_n > 256:
        raise SpecError(
            f"block_n={tile.block_n} is not valid for program='wgmma' and a {spec.mlp} MLP. "
            f"Must be a multiple of {columns} up to 256. {hint}"
        )
    if tile.block_k * size != 128:
        raise SpecError(f"block_k={tile.block_k} is not valid for program='wgmma'. Must be 64: rows of 128 bytes. {hint}")
    if tile.stages < 3:
        raise SpecError(f"stages={tile.stages} is not valid for program='wgmma'. Must be at least 3.")
    threads = 128 + tile.block_m // 64 * 128  # a warpgroup that loads, and one per 64 rows
    stage_bytes = (tile.block_m + tile.block_n) * 128
    patches = 8 * 16 * (64 + 8) * size  # of each consumer warp: 16 rows of 64 columns, padded against bank conflicts
    work_bytes = _ceil(max(tile.stages * stage_bytes + patches, _PLANNER_BYTES), 128) * 128
    slots = 2 * (40 + 20 * tile.block_m)
    mail = 2 * (8 + 32) + 16
    shared_bytes = work_bytes + slots + _sums_bytes(threads) + mail + 8 * (2 * tile.stages + 7)  # struct BlockState
    _check_shared(tile, stage_bytes, shared_bytes, arch)
    return {
        "threads": threads,
        "stage_bytes": stage_bytes,
        "work_bytes": work_bytes,
        "shared_bytes": shared_bytes,
        "min_blocks": 1,
        "tensor_boxes": ((tile.block_n // 2 if gated else tile.block_n) // tile.cluster, tile.block_n // tile.cluster),
        "ring_box": 64,
        # Together what three warpgroups get at the launch, 168 each; the sums of a consumer are block_n / 2.
        "loader_registers": 104,
        "consumer_registers": 200,
        "near_end": 2 * tile.stages,
    }


def _sums_bytes(threads: int) -> int:
    """A word per warp, four at a time, behind padding to 16 bytes; all of struct BlockState a multiple of 16."""
    return _ceil(4 * threads // WARP, 16) * 16 + 16


def _check_shared(tile: TileConfig, stage_bytes: int, shared_bytes: int, arch: Arch) -> None:
    if shared_bytes > arch.shared_bytes:
        raise UnsupportedError(
            f"stages={tile.stages} of {stage_bytes} bytes need {shared_bytes} bytes of shared memory; "
            f"{arch.name} has {arch.shared_bytes} per block. Take fewer stages or a smaller tile."
        )


def _min_blocks(warps: int, shared_bytes: int, arch: Arch) -> int:
    """The blocks of a multiprocessor that fit its shared memory and leave a thread enough registers."""
    blocks = 1
    while True:
        # The driver takes 1 KiB of every block, also of the one that may use all of `arch.shared_bytes`.
        fits = (blocks + 1) * (shared_bytes + _DRIVER_BYTES) <= arch.shared_bytes + _DRIVER_BYTES
        # Warps are dealt to four partitions; each has a quarter of the registers.
        registers = arch.registers // 4 // WARP // _ceil((blocks + 1) * warps, 4)
        if not fits or registers < _ENOUGH_REGISTERS:
            return blocks
        blocks += 1


@dataclass(frozen=True)
class RouterPlan:
    """The numbers of one router kernel. It has no tile to choose, and any number of threads or blocks may run it.

    Attributes:
        block_tokens: tokens whose logits are made together; on a GPU each such group has a counter word.
        block_experts: experts of the narrowest tile (GPU), 0 on the host.
        threads: threads of a block (GPU), 0 on the host.
        shared_bytes: dynamic shared memory of a block: stages of wide tiles, or the sums of a narrow one.
        max_experts: the most experts a launch may ask for.
    """

    block_tokens: int
    block_experts: int
    threads: int
    shared_bytes: int
    max_experts: int = MAX_EXPERTS

    def counter_words(self, tokens: int) -> int:
        """32-bit words of ``RouterArgs.counters``: zero before the first call, and left zero by every call."""
        return _ceil(tokens, self.block_tokens) if self.threads else 0

    def blocks(self, tokens: int, experts: int, multiprocessors: int) -> int:
        """Blocks worth launching (GPU): the kernel walks over its tiles in steps of the grid, whatever that is."""
        tiles = _ceil(tokens, self.block_tokens) * _ceil(experts, self.block_experts)
        return max(1, min(tiles, multiprocessors))


def plan_router(arch: str) -> RouterPlan:
    """Compute the plan of the router kernel.

    Raises:
        UnsupportedError: the arch is unknown.
    """
    if get_arch(arch).is_host:
        return RouterPlan(block_tokens=32, block_experts=0, threads=0, shared_bytes=0)
    # One fragment of the matrix units; six stages of 64 + 64 rows of 128 bytes, which every GPU has room for.
    return RouterPlan(block_tokens=16, block_experts=8, threads=8 * WARP, shared_bytes=6 * 128 * 128)
