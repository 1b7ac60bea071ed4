"""The host program: one thread per role, dot products in C++."""

from __future__ import annotations

from collections.abc import Iterator

from ..arch import Arch
from ..dtypes import DTYPES
from ..plan import KernelPlan, Operand, common_plan, mlp_phases
from ..spec import MoESpec
from ..tile import TileConfig
from .base import PROTOCOL, BlockProgram, check_math

_COLUMN_STEP = 2  # columns made at a time


class HostProgram(BlockProgram):
    """Tasks run by the threads of one process, for machines without a GPU; the shared-memory fields of a tile mean nothing."""

    name = "host"
    archs = ("host",)
    dtypes = tuple(DTYPES)
    parts = (
        "host/runtime.h", "host/platform.h", "common/constants.cuh", "host/element.h", "common/element.cuh",
        "common/rows.cuh", "common/args.cuh", "common/bias.cuh", "common/activation.cuh",
        *PROTOCOL, "host/gemm.h", "host/tasks.h", "host/moe_block.h",
    )  # fmt: skip

    def default_tile(self, spec: MoESpec, arch: Arch) -> TileConfig:
        return TileConfig(block_m=32, block_n=64, program=self.name)

    def plan(self, spec: MoESpec, tile: TileConfig, arch: Arch) -> KernelPlan:
        check_math(spec, tile, arch, ("ffma",))
        phases = mlp_phases(spec, tile, tile.block_n, Operand("tokens"), Operand("weights"))
        return KernelPlan(**common_plan(spec, tile, phases, column_step=_COLUMN_STEP))

    def tiles(self, spec: MoESpec, arch: Arch) -> Iterator[TileConfig]:
        for block_m in (8, 16, 32, 64):
            for block_n in (32, 64, 128):
                yield TileConfig(block_m=block_m, block_n=block_n, program=self.name)
