"""flashmoe-py's router: a softmax over all experts, the ``top_k`` largest, weights that sum to one."""

from __future__ import annotations

from ..errors import CommError, SpecError, UnsupportedError
from ..launch import choose
from ..router import Router
from . import memory, world
from .arguments import ContextHandle, InitArgs, RouterForwardArgs, of_kind
from .moe import Moe

__all__ = ["RouterForwardArgs", "finalize", "forward", "initialize"]

_ALIKE = "data_type tokens_per_rank token_dim num_experts top_k device_id"


class Gate:
    """A router on raw addresses, for layers of the same sizes."""

    def __init__(self, args: InitArgs) -> None:
        self._device = memory.on_device(args.device_id, args.gpu_arch)
        self._open = False
        spec = args.spec(1)
        self._comm = world.enter(args.device_id)
        try:
            with self._device:
                self._target = choose(memory.target_name())
                memory.stream_of(self._target, args.stream_ptr)
                self._router = Router(spec, self._target, self._comm)
                self._counter = memory.Counter(self._target, spec.num_experts)
        except BaseException:
            world.leave()
            raise
        self._args, self._spec = args, spec
        self._open = True

    def forward(self, moe: Moe, args: RouterForwardArgs) -> None:
        """Choose the experts of the next call of ``moe``, and count them."""
        if not self._open:
            raise CommError("The handle of the router has been finalised.")
        moe.require_open()
        if differs := self._args.differs(moe.args, _ALIKE):
            raise SpecError(f"flash_handle is not valid: router and layer were initialised with {differs}.")
        spec, target = self._spec, self._target
        stream = memory.stream_of(target, args.stream_ptr)
        tokens, weights = (
            memory.array_at(target, name, getattr(args, name), (rows, spec.hidden_size), spec.dtype, memory.ROW_ALIGNMENT)
            for name, rows in (("tokens", spec.max_tokens), ("weights", spec.num_experts))
        )
        counts = memory.array_at(target, "expert_counts", args.expert_counts, (spec.num_experts,), "int32")
        with self._device:
            self._router(tokens, weights, stream=stream, out=(moe.ids, moe.weights))
            self._counter.count(moe.ids, counts, stream)
        moe.routed = True

    def close(self, stream_ptr: int | None) -> None:
        if not self._open:
            return
        memory.wait_for(self._target, stream_ptr)
        self._open = False
        try:
            self._router.close()
        finally:
            world.leave()


def initialize(arg: InitArgs, return_logits: bool = False) -> ContextHandle:
    """Make the router of a layer. Joins the ranks of the job if nothing has yet.

    Raises:
        UnsupportedError: ``return_logits``: the router returns no scores.
        SpecError: a field of ``arg`` is not valid.
    """
    if return_logits:
        raise UnsupportedError("return_logits=True is not supported: the router returns no scores. Must be False.")
    return ContextHandle(Gate(arg), None)


def forward(router_handle: ContextHandle, flash_handle: ContextHandle, arg: RouterForwardArgs) -> None:
    """Choose the experts of each token for the next ``forward`` of ``flash_handle``, and write how many routes each has.

    Raises:
        SpecError: an address is not valid, or the two handles do not fit each other.
        CommError: a handle has been finalised.
    """
    gate, moe = of_kind(router_handle, Gate, "router.initialize()"), of_kind(flash_handle, Moe, "initialize()")
    gate.forward(moe, arg)


def finalize(handle: ContextHandle, stream_ptr: int | None = None) -> None:
    """Wait for the stream, and give the router back; the second time nothing happens."""
    of_kind(handle, Gate, "router.initialize()").close(stream_ptr)
