"""The seeded scheduler: several ranks as fibers of one thread, every switch and every delay decided by a seed.

A hang or a wrong result comes back with its seed. The fibers' stores to peers become visible late, at the latest with the
next release of the right scope, so a missing release is seen on a machine whose own memory order would hide it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..args import HEAP, LAUNCH
from ..errors import SpecError
from .host import HostKernel, load_program
from .target import Memory


@functools.lru_cache(maxsize=1)
def _explorer() -> ctypes.CDLL:
    library = load_program("explorer")
    library.flashmoe_explore.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    ]  # fmt: skip
    library.flashmoe_explore.restype = ctypes.c_uint64
    return library


def explore(
    calls: Sequence[Sequence[tuple[HostKernel, np.ndarray[Any, Any]]]],
    heaps: Sequence[Memory],
    *,
    threads: int,
    seed: int,
    lost_word: int | None = None,
) -> int:
    """Run ``calls[rank][n]`` on all ranks at once, the calls of a rank one after the other.

    Args:
        calls: kernel and packed arguments; as many calls on every rank.
        heaps: the symmetric heap of each rank.
        threads: roles per rank: scheduler, subscriber and at least one processor.
        seed: decides the policy (uniform, random priorities, one slow rank), the switches and the delays.
        lost_word: address of a signal word that is never delivered, or ``None``.

    Returns:
        The number of protocol steps; a deadline in ``MoEArgs`` counts one microsecond per step.

    Raises:
        SpecError: ranks with different numbers of calls, or too few threads.
    """
    if len({len(rank) for rank in calls}) != 1 or threads < 3:
        raise SpecError("explore() needs as many calls on every rank, and at least 3 threads.")
    table = np.array([(kernel.entry, args.ctypes.data) for rank in calls for kernel, args in rank], LAUNCH.dtype)
    places = np.array([(heap.pointer, heap.nbytes) for heap in heaps], HEAP.dtype)
    run = _explorer().flashmoe_explore
    return int(run(table.ctypes.data, places.ctypes.data, len(calls), len(calls[0]), threads, seed, lost_word))
