"""What a layer's kernels count, read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .args import STATE
from .launch.target import Memory
from .layout import Region


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


def read_state(memory: Memory, regions: dict[str, Region]) -> Any:
    """The layer's ``State``, after waiting for the calls in flight."""
    region = regions["state"]
    return memory.read(region.offset, region.bytes).view(STATE.dtype)[0]
