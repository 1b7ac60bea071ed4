"""Where everything lies in memory: the symmetric heap all layers of a communicator share, and a layer's workspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .args import CONTROL, LIST_ENTRY, READY_BLOCK, SEGMENT, STATE, TRACE_EVENT
from .plan import CHUNK_TOKENS, KernelPlan, TileConfig
from .spec import MAX_EXPERTS, MAX_WORLD_SIZE, MoESpec
from .values import require_counts

_ALIGN = 256
_L2_SHARE = 32 << 20  # bytes of one expert's weights that neighbouring M-blocks find in a GPU's L2: measured on H100
_PANEL = 8
COUNT_STRIDE = MAX_EXPERTS + 1  # a source's tokens, then rows per expert slot
COUNTER_WORDS = 8 + MAX_WORLD_SIZE  # struct Counters


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Region:
    """A named range of bytes. ``persistent`` ones carry state from call to call; the rest may hold anything before a call."""

    name: str
    offset: int
    bytes: int
    persistent: bool


def _place(parts: Iterable[tuple[str, int, bool]]) -> dict[str, Region]:
    regions, offset = {}, 0
    for name, size, persistent in parts:
        regions[name] = Region(name, offset, size, persistent)
        offset = _ceil(offset + size, _ALIGN) * _ALIGN
    return regions


def total_bytes(regions: dict[str, Region]) -> int:
    """Bytes from the first region to the end of the last, rounded up to the alignment."""
    return max(_ceil(region.offset + region.bytes, _ALIGN) * _ALIGN for region in regions.values())


@dataclass(frozen=True)
class HeapNeeds:
    """What a layer asks of the symmetric heap; :meth:`union` covers several layers.

    Attributes:
        max_tokens: tokens of one rank.
        routes: ``max_tokens * top_k``.
        source_bytes: token rows of one source.
        return_bytes: rows that come back.
        returns: rows that can come back, one signal word each.
    """

    max_tokens: int = 0
    routes: int = 0
    source_bytes: int = 0
    return_bytes: int = 0
    returns: int = 0

    @classmethod
    def of(cls, spec: MoESpec, combine: str) -> HeapNeeds:
        row = spec.hidden_size * spec.element.size
        returns = spec.max_tokens * return_slots(spec, combine)
        return cls(
            max_tokens=spec.max_tokens,
            routes=spec.max_tokens * spec.top_k,
            source_bytes=_ceil(spec.max_tokens * row, _ALIGN) * _ALIGN,
            return_bytes=returns * row,
            returns=returns,
        )

    def union(self, other: HeapNeeds) -> HeapNeeds:
        """The smallest needs that cover both."""
        return HeapNeeds(*(max(a, b) for a, b in zip(vars(self).values(), vars(other).values())))


def return_slots(spec: MoESpec, combine: str) -> int:
    """Rows that can come back per token: one per route, or one per rank that owns any of its experts."""
    return spec.top_k if combine == "route" else min(spec.top_k, spec.world_size)


@dataclass(frozen=True)
class HeapLayout:
    """Byte offsets in the symmetric heap: the same on every rank and for every layer of the communicator."""

    needs: HeapNeeds
    world_size: int
    regions: dict[str, Region]

    @classmethod
    def of(cls, needs: HeapNeeds, world_size: int) -> HeapLayout:
        word, sources = 8, MAX_WORLD_SIZE
        chunks = _ceil(needs.max_tokens, CHUNK_TOKENS)
        parts = [
            ("control", CONTROL.size, True),
            ("counts", 2 * sources * COUNT_STRIDE * word, True),
            ("chunk_signals", 2 * sources * chunks * word, True),
            ("return_signals", needs.returns * word, True),
            ("lists", world_size * needs.routes * LIST_ENTRY.size, False),
            ("ordinals", world_size * needs.routes * 4, False),
            ("rows", (world_size - 1) * needs.source_bytes, False),
            ("returns", needs.return_bytes, False),
        ]
        return cls(needs, world_size, _place(parts))

    @property
    def bytes(self) -> int:
        return total_bytes(self.regions)

    def arguments(self) -> dict[str, int]:
        """The heap fields of ``MoEArgs``."""
        at = {f"{name}_at": region.offset for name, region in self.regions.items() if name != "control"}
        return {
            **at,
            "source_stride": self.needs.source_bytes,
            "count_stride": COUNT_STRIDE,
            "chunk_stride": _ceil(self.needs.max_tokens, CHUNK_TOKENS),
            "list_stride": self.needs.routes,
        }


@dataclass(frozen=True)
class WorkspaceLayout:
    """A layer's rank-local memory.

    Attributes:
        regions: byte ranges by name.
        sizes: the integer fields of ``MoEArgs`` that describe them.
    """

    regions: dict[str, Region]
    sizes: dict[str, int]

    @classmethod
    def of(
        cls,
        spec: MoESpec,
        tile: TileConfig,
        plan: KernelPlan,
        *,
        combine: str,
        local_experts: int,
        processors: int,
        planners: int,
        tracks: int = 0,
        trace_events: int = 0,
    ) -> WorkspaceLayout:
        size = spec.element.size
        routes = spec.max_tokens * spec.top_k
        per_source = routes if spec.capacity is None else min(routes, spec.capacity * local_experts)
        rows = per_source * spec.world_size if local_experts else 0
        matrices = 3 if spec.mlp == "gated" else 2
        expert_bytes = matrices * spec.hidden_size * spec.intermediate_size * size
        cluster = tile.cluster
        max_panel = tile.group or (_PANEL if expert_bytes > _L2_SHARE else 1)
        max_panel = _ceil(max_panel, cluster) * cluster
        blocks = rows // tile.block_m + cluster * min(local_experts, rows)  # the rest of an expert's rows may be a whole claim
        by_rank = combine == "rank"
        # Processors hold two tickets each, the running and the next one: a GEMM2 that follows its GEMM1 by fewer tasks than
        # that would wait for tiles that have only just been claimed. `lag` M-blocks put lag GEMM1 and lag - 1 GEMM2 between.
        in_flight, tiles = 2 * processors * cluster, plan.gemm1_tiles + plan.gemm2_tiles
        lag = _ceil(in_flight + plan.gemm2_tiles, tiles) if tile.lag is None else tile.lag
        between = lag * tiles - plan.gemm2_tiles
        # As the scheduler has it for full panels. Where they hold fewer M-blocks it keeps more of them, in no more slots.
        panel_lag = _ceil(_ceil(between, max_panel) + plan.gemm2_tiles, tiles) if lag else 0
        ring_slots = max(lag + _ceil(in_flight, plan.gemm1_tiles) + 1, (panel_lag + 2) * max_panel)
        ring_slots = max(cluster, min(blocks, ring_slots))
        max_panel = max(cluster, min(max_panel, ring_slots // 2 // cluster * cluster))
        column_bits_at = COUNTER_WORDS
        gemm2_done_at = column_bits_at + blocks * plan.column_words
        routes_done_at = gemm2_done_at + blocks
        set_words = _ceil(routes_done_at + (spec.world_size * spec.max_tokens if by_rank else 0), 4) * 4
        require_counts(
            f"max_tokens={spec.max_tokens} with top_k={spec.top_k} on world_size={spec.world_size} ranks",
            rows=rows,
            tasks=2 * (rows // tile.block_m + local_experts * max_panel) * tiles,
            counter_words=set_words,
        )
        parts = [
            ("state", STATE.size, True),
            ("counter_sets", 2 * set_words * 4, True),
            ("appended", blocks * 4, True),
            ("planner_counts", planners * spec.num_experts * 4, False),
            ("narrow_ids", routes * 4, False),  # int64 ids of a call, as the kernel takes them
            ("route_target", routes * 4, False),
            ("segments", spec.world_size * local_experts * SEGMENT.size, False),
            ("ready", blocks * READY_BLOCK.size, False),
            ("entries", 2 * blocks * 2 * READY_BLOCK.size, False),
            ("ring", ring_slots * tile.block_m * spec.intermediate_size * size, False),
            ("staged_rows", rows * spec.hidden_size * size if by_rank else 0, False),
            ("trace", tracks * trace_events * TRACE_EVENT.size, False),
            ("trace_counts", tracks * 4, True),
        ]
        sizes = {
            "set_words": set_words,
            "column_bits_at": column_bits_at,
            "gemm2_done_at": gemm2_done_at,
            "routes_done_at": routes_done_at,
            "ring_slots": ring_slots,
            "lag": lag,
            "max_panel": max_panel,
            "staged_stride": per_source,
            "trace_events": trace_events,
        }
        return cls(_place(parts), sizes)

    @property
    def bytes(self) -> int:
        return total_bytes(self.regions)
