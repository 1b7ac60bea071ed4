"""Where a layer runs: what it was told, else the environment, else its communicator, else a GPU if there is one."""

from __future__ import annotations

from .. import env
from ..errors import SpecError
from .cuda import CudaTarget, device_count
from .host import HostTarget
from .target import Target


def choose(
    name: str | None,
    default: str | None = None,
    max_blocks: int | None = None,
    sharing: int = 1,
    *,
    device: int | None = None,
    reserve_multiprocessors: int = 0,
) -> Target:
    """Make a target.

    Args:
        name: ``"host"``, ``"cuda"``, or ``None``: ``FLASHMOE_TARGET`` says it, else ``default``, else whether there is a GPU.
        default: where the communicator runs already; ``None``: nowhere yet.
        max_blocks: the most blocks of a launch on a GPU; ``None``: all that are resident.
        sharing: ranks of the communicator that share what it runs on.
        device: number of the GPU; ``None``: the current one.
        reserve_multiprocessors: multiprocessors of a GPU that launches leave to others.

    Raises:
        SpecError: an argument or ``FLASHMOE_TARGET`` is not valid.
        UnsupportedError, FlashMoEError: as :class:`~flashmoe_gen.launch.cuda.CudaTarget`.
    """
    chosen = name or env.target() or default
    if chosen is None:
        chosen = "cuda" if device is not None or device_count() > 0 else "host"
    if chosen == "cuda":
        return CudaTarget(max_blocks, sharing, device=device, reserve_multiprocessors=reserve_multiprocessors)
    if chosen != "host":
        raise SpecError(f"target={name!r} is not valid. Must be 'host' or 'cuda'.")
    for option, value in (("max_blocks", max_blocks), ("reserve_multiprocessors", reserve_multiprocessors or None)):
        if value is not None:
            raise SpecError(f"{option}= is not valid for target='host'.")
    if device is not None:
        raise SpecError(f"The communicator's rank is on GPU {device}. target='host' is not valid there.")
    return HostTarget(sharing)
