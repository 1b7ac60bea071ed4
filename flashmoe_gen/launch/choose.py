"""Where a layer runs: what it was told, else the environment, else its communicator, else a GPU if there is one."""

from __future__ import annotations

from .. import env
from ..errors import SpecError
from .cuda import CudaTarget, device_count
from .host import HostTarget
from .target import Target


def choose(name: str | None, default: str | None = None, max_blocks: int | None = None, ranks_here: int = 1) -> Target:
    """Make a target.

    Args:
        name: ``"host"``, ``"cuda"``, or ``None``: ``FLASHMOE_TARGET`` says it, else ``default``, else whether there is a GPU.
        default: where the communicator runs already; ``None``: nowhere yet.
        max_blocks: the most blocks of a launch on a GPU; ``None``: all that are resident.
        ranks_here: ranks of the communicator in this process, which share what it runs on.

    Raises:
        SpecError: an argument or ``FLASHMOE_TARGET`` is not valid.
        UnsupportedError, FlashMoEError: as :class:`~flashmoe_gen.launch.cuda.CudaTarget`.
    """
    chosen = name or env.target() or default
    if chosen is None:
        chosen = "cuda" if device_count() > 0 else "host"
    if chosen == "cuda":
        return CudaTarget(max_blocks, ranks_here)
    if chosen != "host":
        raise SpecError(f"target={name!r} is not valid. Must be 'host' or 'cuda'.")
    if max_blocks is not None:
        raise SpecError("max_blocks= is not valid for target='host'.")
    return HostTarget(ranks_here)
