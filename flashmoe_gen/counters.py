"""What a layer's kernels count and record in its workspace, read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .args import STATE, TRACE_EVENT
from .errors import TraceRoomError
from .launch.target import Memory
from .layout import WorkspaceLayout

_TRACE = [("party", "i4"), ("track", "i4"), ("work", "u4"), ("what", "u4", (2,)), ("start", "u8"), ("end", "u8")]


@dataclass(frozen=True)
class LayerStats:
    """What a layer has done on this rank since it was made.

    Attributes:
        calls: finished calls.
        routes: routes sent to experts (on any rank) by this rank's tokens.
        masked: routes with a negative id.
        dropped: routes over the capacity.
        rows: expert rows computed here, for all ranks' tokens.
        blocks: M-blocks computed here.
        padding: rows by which those M-blocks are larger than ``rows``.
    """

    calls: int
    routes: int
    masked: int
    dropped: int
    rows: int
    blocks: int
    padding: int

    @classmethod
    def of(cls, state: Any, block_m: int) -> LayerStats:
        """From the struct that the kernels keep."""
        counts = {name: int(state[name]) for name in ("calls", "routes", "masked", "dropped", "rows", "blocks")}
        return cls(**counts, padding=counts["blocks"] * block_m - counts["rows"])


def read_state(workspace: Memory, layout: WorkspaceLayout) -> Any:
    """The layer's ``State``, after waiting for the calls in flight."""
    region = layout.regions["state"]
    return workspace.read(region.offset, region.bytes).view(STATE.dtype)[0]


def take_trace(workspace: Memory, layout: WorkspaceLayout, room: int, tracks: int) -> np.ndarray[Any, Any]:
    """The events since the last time; see :meth:`flashmoe_gen.MoELayer.take_trace`.

    Raises:
        TraceRoomError: there was no room for all events.
    """
    kept, counted = (layout.regions[name] for name in ("trace", "trace_counts"))
    counts = workspace.read(counted.offset, counted.bytes).view(np.uint32)
    events = workspace.read(kept.offset, kept.bytes).view(TRACE_EVENT.dtype).reshape(len(counts), room)
    workspace.fill(counted.offset, counted.bytes, 0)
    if counts.max() > room:
        raise TraceRoomError(room, int(counts.max()))
    held = np.arange(room) < counts[:, None]
    trace = np.empty(int(counts.sum()), _TRACE)
    trace["party"], trace["track"] = np.divmod(np.nonzero(held)[0], tracks)
    for name in ("work", "what", "start", "end"):
        trace[name] = events[name][held]
    return trace
