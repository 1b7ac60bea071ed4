"""The router's programs. They have no tile to choose, and one of them runs every spec."""

from __future__ import annotations

from dataclasses import dataclass

from ..arch import get_arch
from ..plan import WARP, ceil_div
from ..spec import MAX_EXPERTS
from .base import PTX


@dataclass(frozen=True)
class RouterPlan:
    """The numbers of one router kernel. Any number of threads or blocks may run it.

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
        return ceil_div(tokens, self.block_tokens) if self.threads else 0

    def blocks(self, tokens: int, experts: int, multiprocessors: int) -> int:
        """Blocks worth launching (GPU): the kernel walks over its tiles in steps of the grid, whatever that is."""
        tiles = ceil_div(tokens, self.block_tokens) * ceil_div(experts, self.block_experts)
        return max(1, min(tiles, multiprocessors))

    def table(self) -> dict[str, object]:
        """All numbers by name, for people to read."""
        return dict(vars(self))


@dataclass(frozen=True)
class RouterProgram:
    """The router for the architectures of one compiler.

    Attributes:
        parts: its template parts, in the order in which one needs the other.
        plan: its numbers, for every spec.
    """

    parts: tuple[str, ...]
    plan: RouterPlan


_ROUTERS = {
    "c++": RouterProgram(
        (
            "host/runtime.h", "host/platform.h", "router/constants.cuh", "host/element.h", "common/element.cuh",
            "common/args.cuh", "router/select.cuh", "host/gemm.h", "router/host_block.h",
        ),
        RouterPlan(block_tokens=32, block_experts=0, threads=0, shared_bytes=0),
    ),
    "nvrtc": RouterProgram(
        (
            *PTX, "gpu/platform.cuh", "router/constants.cuh", "gpu/element.cuh", "common/element.cuh", "common/args.cuh",
            "router/select.cuh", "router/gpu_products.cuh", "router/gpu_narrow.cuh", "router/gpu_wide.cuh", "router/gpu_block.cuh",
        ),
        # One fragment of the matrix units; six stages of 64 + 64 rows of 128 bytes, which every GPU has room for.
        RouterPlan(block_tokens=16, block_experts=8, threads=8 * WARP, shared_bytes=6 * 128 * 128),
    ),
}  # fmt: skip


def router_program(arch: str) -> RouterProgram:
    """The router of an architecture.

    Raises:
        UnsupportedError: the arch is unknown.
    """
    return _ROUTERS[get_arch(arch).compiler]


def plan_router(arch: str) -> RouterPlan:
    """The numbers of the router kernel.

    Raises:
        UnsupportedError: the arch is unknown.
    """
    return router_program(arch).plan
