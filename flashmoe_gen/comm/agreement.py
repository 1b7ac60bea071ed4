"""What all ranks must make alike: what they say of it, and the heap they lay out for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CommError
from ..launch.target import Memory
from ..layout import HeapLayout, HeapNeeds

_ORDER = "Every rank makes the same layers in the same order."


def disagreement(what: str, said: Mapping[int, Mapping[str, Any] | None]) -> str:
    """``""`` when all that ranks have said so far is the same, else every field that differs, its values, and their ranks."""
    here = {rank: values for rank, values in sorted(said.items()) if values is not None}
    names = list(dict.fromkeys(name for values in here.values() for name in values))
    parts = []
    for name in names:
        field, values = _narrowed(name, {rank: values.get(name) for rank, values in here.items()})
        ranks_of: dict[str, list[int]] = {}
        for rank, value in values.items():
            ranks_of.setdefault(repr(value), []).append(rank)
        if len(ranks_of) > 1:
            parts.append(" and ".join(f"{field}={value} on {_ranks(ranks)}" for value, ranks in ranks_of.items()))
    return f"The ranks disagree on {what}: {'; '.join(parts)}. {_ORDER}" if parts else ""


def _narrowed(name: str, values: dict[int, Any]) -> tuple[str, dict[int, Any]]:
    """Of tuples of one length, the first entry that differs."""
    first = next(iter(values.values()))
    while isinstance(first, tuple) and all(
        isinstance(value, tuple) and len(value) == len(first) for value in values.values()
    ):
        differs = [at for at in range(len(first)) if any(value[at] != first[at] for value in values.values())]
        if not differs:
            break
        name, values = f"{name}[{differs[0]}]", {rank: value[differs[0]] for rank, value in values.items()}
        first = next(iter(values.values()))
    return name, values


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def cannot(rank: int, what: str, why: str) -> str:
    """That a rank cannot make what all make."""
    return f"Rank {rank} cannot make {what}: {why}"


def no_longer_fits(layout: HeapLayout, needs: HeapNeeds) -> CommError:
    """A layer that comes after the first call and does not fit."""
    union = layout.needs.union(needs)
    return CommError(
        f"The heap has {layout.bytes} bytes per rank and stays where it is since the first call; with this layer it would need "
        f"{HeapLayout.of(union, layout.world_size).bytes}: {needs.fits(layout.needs)}. Make the largest layer before the first "
        "call, call comm.reserve(*specs) with the specs of all layers before it, or set heap_bytes= when the communicator is made."
    )


def laid_out(needs: HeapNeeds, world_size: int, heap_bytes: int | None) -> HeapLayout:
    """The layout for these needs, which fills ``heap_bytes`` when they are given.

    Raises:
        CommError: over ``heap_bytes``.
    """
    if heap_bytes is None:
        return HeapLayout.of(needs, world_size)
    layout = HeapLayout.filling(needs, world_size, heap_bytes)
    if layout.bytes > heap_bytes:
        raise CommError(
            f"heap_bytes={heap_bytes} is too small: the layers of this communicator need {layout.bytes} bytes per rank."
        )
    return layout


def clear(heap: Memory, layout: HeapLayout) -> None:
    """Let the signals and epochs of a heap start from zero."""
    for region in layout.regions.values():
        if region.persistent:
            heap.fill(region.offset, region.bytes, 0)
