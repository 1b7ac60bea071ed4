"""flashmoe-py's questions about the ranks of the job."""

from __future__ import annotations

import os

from ..comm.bootstrap import launched
from ..launch import choose
from . import memory, world


def get_local_rank() -> int:
    """This process among those of its machine, which is also the GPU it should take; 0 where no launcher started it.

    Raises:
        SpecError: two launchers contradict each other.
    """
    if (joined := world.current()) is not None:
        return joined.local_rank
    return launched("auto", os.environ).rank  # all ranks are on one machine, or cannot join


def initialize() -> None:
    """Collective: join the ranks of the job, on the GPU :func:`get_local_rank`; nothing when that is done already.

    Raises:
        What :func:`flashmoe_gen.comm.init` raises.
    """
    world.join(get_local_rank())


def get_rank() -> int:
    """This rank among all of the job.

    Raises:
        CommError: before :func:`initialize`.
    """
    return world.joined().rank


def get_world_size() -> int:
    """Ranks of the job.

    Raises:
        CommError: before :func:`initialize`.
    """
    return world.joined().world_size


def sync_all(stream_ptr: int) -> None:
    """Collective: wait for the stream, and then until every rank is here (at most ``FLASHMOE_TIMEOUT_S``).

    Raises:
        CommError: before :func:`initialize`, or a rank did not come.
    """
    joined = world.joined()
    memory.wait_for(choose(memory.target_name()), stream_ptr)
    joined.barrier()
