"""The names of flashmoe-py 0.1.2, so that its programs run with one changed import: ``import flashmoe_gen.compat as flashmoe``.

Everything is passed as integers: addresses of contiguous memory, on the GPU ``device_id`` or, for the host target, of this
process; and handles of CUDA streams. Whoever makes memory keeps it until the calls that use it have run. README.md says what
differs from flashmoe-py.
"""

from __future__ import annotations

from . import cb, reference, router
from .arguments import ActivationType, ContextHandle, DataType, ForwardArgs, InitArgs, MLPType, Topology, of_kind
from .cb import get_local_rank
from .moe import Moe

__all__ = [
    "ActivationType",
    "ContextHandle",
    "DataType",
    "ForwardArgs",
    "InitArgs",
    "MLPType",
    "Topology",
    "cb",
    "finalize",
    "forward",
    "get_local_rank",
    "initialize",
    "reference",
    "router",
]


def initialize(arg: InitArgs) -> ContextHandle:
    """Collective: make a layer. The first one joins the ranks of the job; all layers are made in the same order on every rank.

    Fills in ``ep_world``, ``num_local_experts``, ``ep_rank``, ``my_pe``, ``expert_map``, ``rank_map`` and ``topo`` of ``arg``.

    Raises:
        SpecError: a field of ``arg`` is not valid; names it.
        UnsupportedError: a field has a meaning, but not here; names it, and what is supported.
        CompileError, CacheError: a kernel cannot be built.
        CommError: the ranks cannot work together.
    """
    moe = Moe(arg)
    return ContextHandle(moe, moe.context)


def forward(handle: ContextHandle, args: ForwardArgs) -> None:
    """Collective: run the layer on the routing that ``router.forward`` has left in ``handle``, which stays there.

    On a GPU it returns before it has run; ``moe_out`` is NaN when it failed, and the next call raises.

    Raises:
        SpecError: an address is not valid, or nothing has been routed.
        UnsupportedError: a field has a meaning, but not here.
        KernelTimeoutError, CommError: this call (host) or an earlier one failed, or the handle has been finalised.
    """
    of_kind(handle, Moe, "initialize()").forward(args)


def finalize(handle: ContextHandle, stream_ptr: int | None = None) -> None:
    """Wait for the stream and give the layer back, with the last handle the communicator too; the second time nothing happens."""
    of_kind(handle, Moe, "initialize()").close(stream_ptr)
