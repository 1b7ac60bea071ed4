"""The mma program: ``mma.sync`` fed by ``cp.async``, for every GPU and every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..arch import GPU_ARCHS, Arch
from ..args import SCRATCH_BYTES, mma_structs
from ..dtypes import DTYPES, get_dtype
from ..errors import SpecError
from ..plan import WARP, KernelPlan, Operand, ceil_div, common_plan, mlp_phases
from ..spec import MoESpec
from ..structs import Struct
from ..tile import TileConfig
from .base import PROTOCOL, PTX, BlockProgram, check_math, check_shared

_ENOUGH_REGISTERS = 160  # of a thread: the accumulators of a warp's 32 x 64 and everything around them
_DRIVER_BYTES = 1024  # shared memory the driver takes of every block
_MATH = ("tf32", "ffma")


class MmaProgram(BlockProgram):
    """Warps multiply what one stage of shared memory holds while ``cp.async`` fills the next ones."""

    name = "mma"
    archs = GPU_ARCHS
    dtypes = tuple(DTYPES)
    parts = (
        *PTX, "gpu/platform.cuh", "common/constants.cuh", "gpu/element.cuh", "common/element.cuh",
        "common/rows.cuh", "common/args.cuh", "common/bias.cuh", "common/activation.cuh",
        *PROTOCOL, "gpu/finished.cuh", "gpu/epilogue.cuh", "gpu/operands.cuh", "mma/products.cuh", "mma/pipeline.cuh",
        "gpu/party.cuh", "mma/tasks.cuh", "mma/moe_block.cuh",
    )  # fmt: skip

    def default_tile(self, spec: MoESpec, arch: Arch) -> TileConfig:
        # Two blocks of four MMA warps overlap each other's epilogues; where only one fits, it has eight.
        warps_n = 2 if arch.shared_bytes > 160 * 1024 else 4
        tile = TileConfig(block_m=64, block_n=128, block_k=64, stages=3, warps_m=2, warps_n=warps_n, program=self.name)
        if spec.dtype == "float64":
            return tile.replace(block_n=64, block_k=16)
        return tile.replace(block_k=32, math="tf32") if spec.dtype == "float32" else tile

    def plan(self, spec: MoESpec, tile: TileConfig, arch: Arch) -> KernelPlan:
        check_math(spec, tile, arch, _MATH)
        size = get_dtype(spec.dtype).size
        row_bytes = tile.block_k * size
        _check(spec, tile, arch, row_bytes)
        threads = WARP * (tile.warps_m * tile.warps_n + 1)  # one warp fetches tasks
        stage_bytes = (tile.block_m + tile.block_n) * row_bytes
        staged_tile = tile.block_m * (tile.block_n + 8) * size  # rows are padded against bank conflicts
        work_bytes = ceil_div(max(tile.stages * stage_bytes, staged_tile, SCRATCH_BYTES), 128) * 128
        shared_bytes = work_bytes + mma_structs(tile.block_m, threads)[-1].size
        check_shared(tile, stage_bytes, shared_bytes, arch)
        columns = tile.block_n // 2 if spec.mlp == "gated" else tile.block_n
        phases = mlp_phases(spec, tile, columns, Operand("tokens"), Operand("weights"))
        return KernelPlan(
            **common_plan(spec, tile, phases, column_step=64),
            threads=threads,
            stage_bytes=stage_bytes,
            work_bytes=work_bytes,
            shared_bytes=shared_bytes,
            min_blocks=_min_blocks(threads // WARP, shared_bytes, arch),
        )

    def structs(self, tile: TileConfig, plan: KernelPlan) -> tuple[Struct, ...]:
        return mma_structs(tile.block_m, plan.threads)

    def tiles(self, spec: MoESpec, arch: Arch) -> Iterator[TileConfig]:
        size = get_dtype(spec.dtype).size
        warps = ((1, 4), (2, 2), (4, 1), (2, 4), (4, 2))
        maths = _MATH if spec.dtype == "float32" else (None,)
        for block_m, block_n, row_bytes, stages, (warps_m, warps_n), math in itertools.product(
            (16, 32, 64, 128), (64, 128, 256), (64, 128), (2, 3, 4, 5), warps, maths
        ):
            yield TileConfig(
                block_m, block_n, row_bytes // size, stages, warps_m, warps_n, math=math, program=self.name  # type: ignore[arg-type]
            )  # fmt: skip


def _check(spec: MoESpec, tile: TileConfig, arch: Arch, row_bytes: int) -> None:
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


def _min_blocks(warps: int, shared_bytes: int, arch: Arch) -> int:
    """The blocks of a multiprocessor that fit its shared memory and leave a thread enough registers."""
    blocks = 1
    while True:
        # The driver takes 1 KiB of every block, also of the one that may use all of `arch.shared_bytes`.
        fits = (blocks + 1) * (shared_bytes + _DRIVER_BYTES) <= arch.shared_bytes + _DRIVER_BYTES
        # Warps are dealt to four partitions; each has a quarter of the registers.
        registers = arch.registers // 4 // WARP // ceil_div((blocks + 1) * warps, 4)
        if not fits or registers < _ENOUGH_REGISTERS:
            return blocks
        blocks += 1
