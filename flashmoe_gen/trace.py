"""Traced calls: read back, as Chrome/Perfetto JSON, and as the few numbers that say where the time of one went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .args import TRACE_EVENT, WORKS
from .errors import SpecError, TraceRoomError
from .launch.target import Memory
from .layout import Region

Events = np.ndarray[Any, Any]
_WORK = {name: number for number, name in enumerate(WORKS)}
_TILES = ("gemm1", "gemm2")
_EVENTS = [("party", "i4"), ("track", "i4"), ("work", "u4"), ("what", "u4", (2,)), ("start", "u8"), ("end", "u8")]


def take(memory: Memory, regions: dict[str, Region], room: int, tracks: int) -> Events:
    """The events since the last time; see :meth:`flashmoe_gen.MoELayer.take_trace`.

    Raises:
        TraceRoomError: there was no room for all events.
    """
    kept, counted = (regions[name] for name in ("trace", "trace_counts"))
    counts = memory.read(counted.offset, counted.bytes).view(np.uint32)
    events = memory.read(kept.offset, kept.bytes).view(TRACE_EVENT.dtype).reshape(len(counts), room)
    memory.fill(counted.offset, counted.bytes, 0)
    if counts.max() > room:
        raise TraceRoomError(room, int(counts.max()))
    held = np.arange(room) < counts[:, None]
    trace = np.empty(int(counts.sum()), _EVENTS)
    trace["party"], trace["track"] = np.divmod(np.nonzero(held)[0], tracks)
    for name in ("work", "what", "start", "end"):
        trace[name] = events[name][held]
    return trace


@dataclass(frozen=True)
class Summary:
    """Where the time of one rank's call went, in microseconds from the start of its first party.

    ``None`` where a trace does not tell: the host records no ``first_task``, and a rank without rows has no tiles.

    Attributes:
        total: until the last party has left.
        last_start: the last party (block, thread) has started.
        listed: every route is in its owner's list, and local rows can be read.
        first_task: the first task is known to a processor.
        first_products: a matrix unit has its first operands.
        last_gemm1, last_gemm2: the last tile of each is finished.
        arrival_to_products: from ``listed`` to ``first_products``.
        tail: from ``last_gemm2`` to the end.
        busy_percent: part of ``total`` in which a track that runs tiles multiplies, over all of them.
        bubble: median time without products between two neighbouring tiles of a track.
        bubble_90: the 90th percentile of it.
        idle_at_end: mean time from a track's last tile to ``last_gemm2``.
        tiles: GEMM1 and GEMM2 tiles, empty ones not counted.
    """

    total: float
    last_start: float
    listed: float | None
    first_task: float | None
    first_products: float | None
    last_gemm1: float | None
    last_gemm2: float | None
    arrival_to_products: float | None
    tail: float | None
    busy_percent: float | None
    bubble: float | None
    bubble_90: float | None
    idle_at_end: float | None
    tiles: int


def summarize(events: Events) -> Summary:
    """The numbers of one rank's only call in ``events`` (:meth:`flashmoe_gen.MoELayer.take_trace`).

    Raises:
        SpecError: there is no call in it, or more than one.
    """
    whole = _of(events, "kernel")
    parties = len(np.unique(whole["party"]))
    if not parties or len(whole) != parties:
        raise SpecError(f"A summary is of one call, but these events hold {len(whole)} visits of {parties} parties.")
    origin = whole["start"].min()

    def last(work: str) -> float | None:
        ends = _of(events, work)["end"]
        return float(ends.max() - origin) / 1e3 if len(ends) else None

    tiles = np.concatenate([_of(events, work) for work in _TILES])
    fills = {_place(fill): fill for fill in _of(events, "fill")}
    ends_of_products = {_place(part): part["start"] for part in _of(events, "epilogue")}
    gaps: list[float] = []
    idle: list[float] = []
    busy, first_products = 0.0, np.inf
    finish = tiles["end"].max() if len(tiles) else origin
    owners = np.unique(tiles[["party", "track"]])
    for owner in owners:
        mine = np.sort(tiles[tiles[["party", "track"]] == owner], order="start")
        before = None
        for tile in mine:
            fill = fills.get(_place(tile))
            begin = float((fill["end"] if fill is not None else tile["start"]) - origin)
            end = float(ends_of_products.get(_place(tile), tile["end"]) - origin)
            busy += end - begin
            first_products = min(first_products, begin)
            if before is not None:
                gaps.append(begin - before)
            before = end
        idle.append(float(finish - mine["end"].max()))
    total = float(whole["end"].max() - origin)
    listed, last_gemm2, fetched = last("write_lists"), last("gemm2"), _of(events, "resolve")
    begun = first_products / 1e3 if len(owners) else None
    return Summary(
        total=total / 1e3,
        last_start=float(whole["start"].max() - origin) / 1e3,
        listed=listed,
        first_task=float(fetched["end"].min() - origin) / 1e3 if len(fetched) else None,
        first_products=begun,
        last_gemm1=last("gemm1"),
        last_gemm2=last_gemm2,
        arrival_to_products=begun - listed if begun is not None and listed is not None else None,
        tail=total / 1e3 - last_gemm2 if last_gemm2 is not None else None,
        busy_percent=100 * busy / (total * len(owners)) if len(owners) and total else None,
        bubble=float(np.median(gaps)) / 1e3 if gaps else None,
        bubble_90=float(np.percentile(gaps, 90)) / 1e3 if gaps else None,
        idle_at_end=float(np.mean(idle)) / 1e3 if idle else None,
        tiles=len(np.unique(tiles[["work", "what"]])),
    )


def chrome(ranks: Sequence[Events]) -> dict[str, Any]:
    """The events of each rank in the Trace Event Format that chrome://tracing and ui.perfetto.dev open; times in us."""
    origin = min((int(events["start"].min()) for events in ranks if len(events)), default=0)
    names = list(WORKS.values())
    found: list[dict[str, Any]] = []
    for rank, events in enumerate(ranks):
        found.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        tracks = int(events["track"].max()) + 1 if len(events) else 1
        for party, track in np.unique(events[["party", "track"]]).tolist():
            name = f"{party:03d}" if tracks == 1 else f"block {party:03d}, warp {track}"
            found.append(
                {"ph": "M", "name": "thread_name", "pid": rank, "tid": party * tracks + track, "args": {"name": name}}
            )
        for event in events:
            found.append(
                {
                    "ph": "X",
                    "name": names[event["work"]],
                    "pid": rank,
                    "tid": int(event["party"]) * tracks + int(event["track"]),
                    "ts": (int(event["start"]) - origin) / 1e3,
                    "dur": int(event["end"] - event["start"]) / 1e3,
                    "args": {"what": event["what"].tolist()},
                }
            )
    return {"displayTimeUnit": "ns", "traceEvents": found}


def _of(events: Events, work: str) -> Events:
    found: Events = events[events["work"] == _WORK[work]]
    return found


def _place(event: Any) -> tuple[int, ...]:
    """Which tile on which track: the same for a tile and what happens inside it."""
    return (int(event["party"]), int(event["track"]), *map(int, event["what"]))
