"""Where everything lies in memory: the symmetric heap all layers of a communicator share, and a layer's workspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .args import CONTROL, LIST_ENTRY, READY_BLOCK, SEGMENT, STATE, TRACE_EVENT
from .plan import CHUNK_TOKENS, KernelPlan, RowFormats, SchedulePlan, ceil_div, return_slots
from .spec import MAX_EXPERTS, MAX_WORLD_SIZE, MoESpec
from .tile import Combine, TileConfig

_ALIGN = 256
COUNT_STRIDE = MAX_EXPERTS + 1  # a source's tokens, then rows per expert slot


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
        offset = ceil_div(offset + size, _ALIGN) * _ALIGN
    return regions


def total_bytes(regions: dict[str, Region]) -> int:
    """Bytes from the first region to the end of the last, rounded up to the alignment."""
    return max(ceil_div(region.offset + region.bytes, _ALIGN) * _ALIGN for region in regions.values())


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
    def of(cls, spec: MoESpec, combine: Combine) -> HeapNeeds:
        rows = RowFormats.of(spec)
        returns = spec.max_tokens * return_slots(spec, combine)
        return cls(
            max_tokens=spec.max_tokens,
            routes=spec.max_tokens * spec.top_k,
            source_bytes=ceil_div(spec.max_tokens * rows.sent.bytes, _ALIGN) * _ALIGN,
            return_bytes=returns * rows.returned.bytes,
            returns=returns,
        )

    def union(self, other: HeapNeeds) -> HeapNeeds:
        """The smallest needs that cover both."""
        return HeapNeeds(*(max(a, b) for a, b in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class HeapLayout:
    """Byte offsets in the symmetric heap: the same on every rank and for every layer of the communicator."""

    needs: HeapNeeds
    world_size: int
    regions: dict[str, Region]

    @classmethod
    def of(cls, needs: HeapNeeds, world_size: int) -> HeapLayout:
        word, sources = 8, MAX_WORLD_SIZE
        chunks = ceil_div(needs.max_tokens, CHUNK_TOKENS)
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
            "chunk_stride": ceil_div(self.needs.max_tokens, CHUNK_TOKENS),
            "list_stride": self.needs.routes,
        }


@dataclass(frozen=True)
class WorkspaceLayout:
    """A layer's rank-local memory: byte ranges by name."""

    regions: dict[str, Region]

    @classmethod
    def of(
        cls,
        spec: MoESpec,
        tile: TileConfig,
        plan: KernelPlan,
        order: SchedulePlan,
        *,
        local_experts: int,
        planners: int,
        tracks: int = 0,
        trace_events: int = 0,
    ) -> WorkspaceLayout:
        routes, blocks = spec.max_tokens * spec.top_k, order.blocks
        parts = [
            ("state", STATE.size, True),
            ("counter_sets", 2 * order.set_words * 4, True),
            ("appended", blocks * 4, True),
            ("planner_counts", planners * spec.num_experts * 4, False),
            ("narrow_ids", routes * 4, False),  # int64 ids of a call, as the kernel takes them
            ("route_target", routes * 4, False),
            ("segments", spec.world_size * local_experts * SEGMENT.size, False),
            ("ready", blocks * READY_BLOCK.size, False),
            ("entries", 2 * blocks * len(plan.phases) * READY_BLOCK.size, False),
            ("ring", order.ring_slots * tile.block_m * plan.rows.middle.bytes, False),
            ("staged_rows", order.rows * plan.rows.returned.bytes if order.staged else 0, False),
            ("trace", tracks * trace_events * TRACE_EVENT.size, False),
            ("trace_counts", tracks * 4, True),
        ]
        return cls(_place(parts))

    @property
    def bytes(self) -> int:
        return total_bytes(self.regions)
