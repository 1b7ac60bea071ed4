"""The wgmma program: Hopper's warpgroup products, fed by TMA and ``cp.async``, in clusters of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ..arch import Arch
from ..args import SCRATCH_BYTES, wgmma_structs
from ..dtypes import get_dtype
from ..errors import SpecError
from ..plan import KernelPlan, Operand, ceil_div, common_plan, mlp_phases
from ..spec import MoESpec
from ..structs import Struct
from ..tile import TileConfig
from .base import PROTOCOL, PTX, BlockProgram, TensorBox, check_math, check_shared

_HINT = "program='mma' takes other tiles."
_EPILOGUE_COLUMNS = 64  # stored at a time


@dataclass(frozen=True)
class WgmmaPlan(KernelPlan):
    """What the wgmma program plans beside the rest.

    Attributes:
        tensor_boxes: rows of the boxes of the tensor maps of gate and up, and of down. A box is ``block_k`` elements of that
            many rows of one expert: what one block of a cluster loads.
        ring_box: rows of a box of the intermediate ring's tensor map.
        loader_registers, consumer_registers: registers of a thread in the two roles.
        near_end: stages before the end of a task at which the next one is claimed.
    """

    tensor_boxes: tuple[int, int] = (0, 0)
    ring_box: int = 0
    loader_registers: int = 0
    consumer_registers: int = 0
    near_end: int = 0


class WgmmaProgram(BlockProgram):
    """A warpgroup loads, two multiply; the blocks of a cluster share what they load."""

    name = "wgmma"
    archs = ("sm_90a",)
    dtypes = ("bfloat16", "float16")
    parts = (
        *PTX, "gpu/platform.cuh", "common/constants.cuh", "gpu/element.cuh", "common/element.cuh",
        "common/rows.cuh", "common/args.cuh", "common/bias.cuh", "common/activation.cuh",
        *PROTOCOL, "gpu/finished.cuh", "gpu/epilogue.cuh", "gpu/operands.cuh", "wgmma/pipeline.cuh", "wgmma/products.cuh",
        "gpu/party.cuh", "wgmma/loads.cuh", "wgmma/tasks.cuh", "wgmma/moe_block.cuh",
    )  # fmt: skip

    def default_tile(self, spec: MoESpec, arch: Arch) -> TileConfig:
        return TileConfig(
            block_m=128, block_n=256, block_k=64, stages=4, warps_m=8, warps_n=1, cluster=2, program=self.name
        )

    def plan(self, spec: MoESpec, tile: TileConfig, arch: Arch) -> WgmmaPlan:
        check_math(spec, tile, arch, ())
        size = get_dtype(spec.dtype).size
        gated = spec.mlp == "gated"
        _check(spec, tile, size)
        threads = 128 + tile.block_m // 64 * 128  # a warpgroup that loads, and one per 64 rows
        stage_bytes = (tile.block_m + tile.block_n) * 128
        patches = 8 * 16 * (_EPILOGUE_COLUMNS + 8) * size  # of each consumer warp: 16 rows, padded against bank conflicts
        work_bytes = ceil_div(max(tile.stages * stage_bytes + patches, SCRATCH_BYTES), 128) * 128
        shared_bytes = work_bytes + wgmma_structs(tile.block_m, threads, tile.stages, tile.cluster)[-1].size
        check_shared(tile, stage_bytes, shared_bytes, arch)
        columns = tile.block_n // 2 if gated else tile.block_n
        phases = mlp_phases(spec, tile, columns, Operand("tokens"), Operand("weights"))
        return WgmmaPlan(
            **common_plan(spec, tile, phases, column_step=_EPILOGUE_COLUMNS),
            threads=threads,
            stage_bytes=stage_bytes,
            work_bytes=work_bytes,
            shared_bytes=shared_bytes,
            min_blocks=1,
            tensor_boxes=(columns // tile.cluster, tile.block_n // tile.cluster),
            ring_box=64,
            # Together what three warpgroups get at the launch, 168 each; the sums of a consumer are block_n / 2.
            loader_registers=104,
            consumer_registers=200,
            near_end=2 * tile.stages,
        )

    def structs(self, tile: TileConfig, plan: KernelPlan) -> tuple[Struct, ...]:
        return wgmma_structs(tile.block_m, plan.threads, tile.stages, tile.cluster)

    def tiles(self, spec: MoESpec, arch: Arch) -> Iterator[TileConfig]:
        for block_n, stages, cluster in itertools.product((64, 128, 192, 256), (3, 4, 5, 6), (1, 2)):
            yield TileConfig(128, block_n, 64, stages, 8, 1, cluster=cluster, program=self.name)

    def tensor_boxes(self, spec: MoESpec, tile: TileConfig, plan: KernelPlan) -> tuple[TensorBox, ...]:
        assert isinstance(plan, WgmmaPlan)
        inner, outer = plan.tensor_boxes
        hidden, middle, size = spec.hidden_size, spec.intermediate_size, spec.element.size
        gate = "gate" if spec.mlp == "gated" else "up"  # a vanilla MLP has no gate: its kernel never loads through that map
        return (
            *(TensorBox(name, "local_experts", middle, hidden, inner, tile.block_k, size) for name in (gate, "up")),
            TensorBox("down", "local_experts", hidden, middle, outer, tile.block_k, size),
            TensorBox("ring", "ring_slots", tile.block_m, middle, plan.ring_box, tile.block_k, size),
        )


def _check(spec: MoESpec, tile: TileConfig, size: int) -> None:
    if tile.block_m != 128 or (tile.warps_m, tile.warps_n) != (8, 1):
        raise SpecError(
            f"block_m={tile.block_m} with {tile.warps_m} x {tile.warps_n} warps is not valid for program='wgmma'. "
            f"Must be 128 rows of 8 x 1 warps: two warpgroups with 64 rows each. {_HINT}"
        )
    columns = _EPILOGUE_COLUMNS * (2 if spec.mlp == "gated" else 1)
    if tile.block_n % columns or tile.block_n > 256:
        raise SpecError(
            f"block_n={tile.block_n} is not valid for program='wgmma' and a {spec.mlp} MLP. "
            f"Must be a multiple of {columns} up to 256. {_HINT}"
        )
    if tile.block_k * size != 128:
        raise SpecError(f"block_k={tile.block_k} is not valid for program='wgmma'. Must be 64: rows of 128 bytes. {_HINT}")
    if tile.stages < 3:
        raise SpecError(f"stages={tile.stages} is not valid for program='wgmma'. Must be at least 3.")
