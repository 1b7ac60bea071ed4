"""Where everything lies in memory: the symmetric heap and the scratch that layers of a communicator share, a layer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from .args import (
    ABORT_RECORD,
    CONTROL,
    LIST_ENTRY,
    READY_BLOCK,
    SCRATCH_STATE,
    SEGMENT,
    STATE,
    SUMMAND,
    TRACE_EVENT,
)  # fmt: skip
from .plan import CHUNK_TOKENS, COUNT_HEADER, KernelPlan, RowFormats, SchedulePlan, ceil_div
from .spec import MAX_EXPERTS, MAX_TOKENS, MoESpec
from .tile import TileConfig

_ALIGN = 256
_WORD = 8
_UNIT = 1 << 16  # of a scale: 1
COUNT_STRIDE = COUNT_HEADER + MAX_EXPERTS


@dataclass(frozen=True)
class Region:
    """A named range of bytes. ``persistent`` ones carry state from call to call; the rest may hold anything before a call."""

    name: str
    offset: int
    bytes: int
    persistent: bool


def _place(parts: Iterable[tuple[str, int, bool]], offset: int = 0) -> dict[str, Region]:
    regions = {}
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
        routes: ``max_tokens * top_k``: list entries of one source, rows that can come back, and a signal word for each.
        source_bytes: token rows of one source.
        return_bytes: rows that come back.
    """

    max_tokens: int = 0
    routes: int = 0
    source_bytes: int = 0
    return_bytes: int = 0

    @classmethod
    def of(cls, spec: MoESpec) -> HeapNeeds:
        rows, routes = RowFormats.of(spec), spec.max_tokens * spec.top_k
        return cls(
            max_tokens=spec.max_tokens,
            routes=routes,
            source_bytes=ceil_div(spec.max_tokens * rows.sent.bytes, _ALIGN) * _ALIGN,
            return_bytes=routes * rows.returned.bytes,
        )

    def union(self, other: HeapNeeds) -> HeapNeeds:
        """The smallest needs that cover both."""
        return HeapNeeds(*(max(a, b) for a, b in zip(vars(self).values(), vars(other).values())))

    def fits(self, there: HeapNeeds) -> str:
        """``""`` when memory laid out for ``there`` serves these needs, else what it lacks."""
        lacks = (f"{name}={mine} (there is room for {had})" for (name, mine), had in zip(vars(self).items(), vars(there).values())
                 if mine > had)  # fmt: skip
        return ", ".join(lacks)

    def times(self, numerator: int, denominator: int) -> HeapNeeds:
        """Scaled, rounded down, never below these."""
        grown = HeapNeeds(*(value * numerator // denominator for value in vars(self).values()))
        return self.union(dataclasses.replace(grown, source_bytes=grown.source_bytes // _ALIGN * _ALIGN))


@dataclass(frozen=True)
class HeapLayout:
    """Byte offsets in the symmetric heap: the same on every rank and for every layer of the communicator."""

    needs: HeapNeeds
    world_size: int
    regions: dict[str, Region]

    @classmethod
    def of(cls, needs: HeapNeeds, world_size: int) -> HeapLayout:
        chunks, others = ceil_div(needs.max_tokens, CHUNK_TOKENS), world_size - 1
        parts = [
            ("control", CONTROL.size, True),
            ("failures", world_size * ABORT_RECORD.size, True),
            ("counts", 2 * world_size * COUNT_STRIDE * _WORD, True),
            ("list_signals", 2 * world_size * _WORD, True),
            ("chunk_signals", 2 * world_size * chunks * _WORD, True),
            ("return_signals", needs.routes * _WORD, True),
            ("lists", world_size * needs.routes * LIST_ENTRY.size, False),
            ("summands", world_size * needs.routes * SUMMAND.size if others else 0, False),
            ("rows", others * needs.source_bytes, False),
            ("returns", needs.return_bytes, False),
        ]
        return cls(needs, world_size, _place(parts))

    @classmethod
    def filling(cls, needs: HeapNeeds, world_size: int, heap_bytes: int) -> HeapLayout:
        """The largest layout in the proportions of ``needs`` that takes no more than ``heap_bytes``; that of ``needs`` when even
        this one takes more."""
        exact = cls.of(needs, world_size)
        growing = max(1, exact.bytes - cls.of(HeapNeeds(), world_size).bytes)
        low, high = _UNIT, max(_UNIT, _UNIT * heap_bytes // growing)  # of which high is over the limit, if only by rounding
        high = min(2 * high, _UNIT * MAX_TOKENS // max(needs.max_tokens, 1))
        while low < high:
            middle = (low + high + 1) // 2
            if cls.of(needs.times(middle, _UNIT), world_size).bytes <= heap_bytes:
                low = middle
            else:
                high = middle - 1
        return cls.of(needs.times(low, _UNIT), world_size)

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
class ScratchNeeds:
    """What a layer asks of the scratch; what one layer left there is nothing to the next, but for the counters.

    Attributes:
        set_words: of a counter set.
        panels: that can be appended in a call.
        rest_bytes: everything else.
    """

    set_words: int
    panels: int
    rest_bytes: int

    def fits(self, there: ScratchNeeds) -> bool:
        """Whether scratch made for ``there`` serves these needs."""
        return all(mine <= had for mine, had in zip(vars(self).values(), vars(there).values()))

    @property
    def counters(self) -> dict[str, Region]:
        """The regions that carry state from call to call: at the same place for all layers."""
        parts = [
            ("scratch_state", SCRATCH_STATE.size, True),
            ("counter_sets", 2 * self.set_words * 4, True),
            ("appended", self.panels * 4, True),
        ]
        return _place(parts)

    @property
    def bytes(self) -> int:
        """Of the whole scratch."""
        return total_bytes(self.counters) + self.rest_bytes


@dataclass(frozen=True)
class ScratchLayout:
    """How one layer uses the scratch of its communicator.

    Attributes:
        needs: what it asks for.
        rest: its regions behind the counters, as if they began at 0.
    """

    needs: ScratchNeeds
    rest: dict[str, Region]

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
    ) -> ScratchLayout:
        world, routes, blocks = spec.world_size, spec.max_tokens * spec.top_k, order.blocks
        outgoing = routes if world > 1 else 0
        sizes = {
            "planner_counts": planners * spec.num_experts * 4,
            "narrow_ids": routes * 4,  # int64 ids of a call, as the kernel takes them
            "route_owner": routes * 4,
            "outgoing_list": outgoing * LIST_ENTRY.size,
            "outgoing_summands": outgoing * SUMMAND.size,
            "outgoing_first": (world + 1) * 4,
            "segments": world * local_experts * SEGMENT.size,
            "pool_first": world * 4,
            "ready": blocks * READY_BLOCK.size,
            "entries": 2 * blocks * len(plan.phases) * READY_BLOCK.size,
            "ring": order.ring_slots * tile.block_m * plan.rows.middle.bytes,
            "staged_rows": order.pool_rows * plan.rows.returned.bytes,
            "staged_entries": order.pool_rows * LIST_ENTRY.size,
        }
        rest = _place((name, size, False) for name, size in sizes.items())
        return cls(ScratchNeeds(order.set_words, blocks, total_bytes(rest)), rest)

    def regions(self, there: ScratchNeeds) -> dict[str, Region]:
        """In scratch that was made for ``there``."""
        counters = there.counters
        first = total_bytes(counters)
        moved = {name: dataclasses.replace(region, offset=first + region.offset) for name, region in self.rest.items()}
        return counters | moved


def layer_regions(tracks: int, trace_events: int) -> dict[str, Region]:
    """What each layer has for itself: its counts, and its trace."""
    parts = [
        ("state", STATE.size, True),
        ("trace", tracks * trace_events * TRACE_EVENT.size, False),
        ("trace_counts", tracks * 4, True),
    ]
    return _place(parts)
