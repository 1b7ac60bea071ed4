"""What a handle of ``initialize`` stands for: a layer, the routing of its next call, and the call itself."""

from __future__ import annotations

import weakref
from operator import attrgetter
from typing import Any, NamedTuple

from ..errors import CommError, SpecError, UnsupportedError
from ..experts import Experts
from ..launch import choose
from ..layer import MoELayer
from ..values import number
from . import memory, world
from .arguments import ForwardArgs, InitArgs

_FIELDS = attrgetter(
    "mt", "tokens", "local_expert_up", "local_expert_up_v", "local_bias_up", "local_bias_up_v", "local_expert_down",
    "local_bias_down", "moe_out", "stream_ptr", "swish_alpha", "swish_beta",
)  # fmt: skip


class _Call(NamedTuple):
    """A call's arguments as a layer takes them."""

    layer: MoELayer
    tokens: Any
    experts: Experts
    out: Any
    stream: int | None


class Moe:
    """A layer on raw addresses.

    Args:
        args: what it is; what it leaves open about the ranks is filled in.

    Raises:
        What :class:`~flashmoe_gen.MoELayer`, :func:`~flashmoe_gen.comm.init` and :mod:`.world` raise.
    """

    def __init__(self, args: InitArgs) -> None:
        self._device = memory.on_device(args.device_id, args.gpu_arch)
        self._open = False
        whole = world.enter(args.device_id)
        try:
            self.args = args
            self._comm, self._placement = world.group_of(args, whole)
            self._layers: dict[tuple[float, float], MoELayer] = {}
            self._layer(1.0, 1.0)
            with self._device:
                self.target = choose(memory.target_name())
                memory.stream_of(self.target, args.stream_ptr)
                routes = args.tokens_per_rank * args.top_k
                self._memory = self.target.allocate(8 * routes)
            shape = args.tokens_per_rank, args.top_k
            self.ids = memory.array_at(self.target, "ids", self._memory.pointer, shape, "int32")
            self.weights = memory.array_at(self.target, "weights", self._memory.pointer + 4 * routes, shape, "float32")
        except BaseException:
            world.leave()
            raise
        self.routed = False  # whether the router has filled both
        self._last: tuple[Any, _Call] | None = None
        self._open = True
        _by_address[self.context] = self

    @property
    def context(self) -> int:
        """Address of the chosen experts, int32 ``[S, k]``."""
        return self._memory.pointer

    def get_tIdx(self, raw_ctx: int) -> int:  # noqa: N802 - flashmoe-py's name
        """The address that ``reference.forward`` knows this layer's routing by."""
        return raw_ctx

    def require_open(self) -> None:
        if not self._open:
            raise CommError("The handle has been finalised.")

    def _layer(self, swish_alpha: float, swish_beta: float) -> MoELayer:
        """The layer with these factors of the activation, which are constants of its kernel."""
        key = swish_alpha, swish_beta
        if key not in self._layers:
            spec = self.args.spec(self._comm.world_size, swish_alpha=swish_alpha, swish_beta=swish_beta)
            with self._device:
                self._layers[key] = MoELayer(
                    spec, target=memory.target_name(), comm=self._comm, placement=self._placement  # type: ignore[arg-type]
                )
        return self._layers[key]

    def forward(self, args: ForwardArgs) -> None:
        """Run the layer on what the router has chosen."""
        with self._comm.telling():  # peers learn what is wrong with this rank's arguments
            self.require_open()
            if not self.routed:
                raise SpecError("forward() before router.forward(): the handle has no routing yet.")
            call = self._bound(args)
        with self._device:
            call.layer(call.tokens, self.ids, self.weights, call.experts, out=call.out, stream=call.stream)

    def _bound(self, args: ForwardArgs) -> _Call:
        """Arrays over the addresses of a call: the same ones as long as those are the same."""
        key = _FIELDS(args)
        if self._last is None or self._last[0] != key:
            self._last = key, self._arrays(args)
        return self._last[1]

    def _arrays(self, args: ForwardArgs) -> _Call:
        made = self.args
        if args.mt != made.mlp_type:
            raise SpecError(f"mt={args.mt!r} is not valid. The handle was initialised with mlp_type={made.mlp_type!r}.")
        stream = memory.stream_of(self.target, args.stream_ptr)
        factors = number("swish_alpha", args.swish_alpha), number("swish_beta", args.swish_beta)
        if factors not in self._layers and memory.is_capturing(stream):
            raise UnsupportedError(
                f"swish_alpha={factors[0]}, swish_beta={factors[1]} are new to this handle, and its stream is being captured: "
                "their kernel cannot be made now. Call forward() with them once before."
            )
        layer = self._layer(*factors)
        dtype, experts = layer.spec.dtype, made.num_local_experts or 0
        tokens, hidden, inner = made.tokens_per_rank, made.token_dim, made.ffn_size

        def at(name: str, *shape: int) -> Any:
            alignment = 1 if "bias" in name else memory.ROW_ALIGNMENT
            return memory.array_at(self.target, name, getattr(args, name), shape, dtype, alignment)

        weights = {
            "up": at("local_expert_up", experts, inner, hidden),
            "up_bias": at("local_bias_up", experts, inner),
            "down": at("local_expert_down", experts, hidden, inner),
            "down_bias": at("local_bias_down", experts, hidden),
        }
        if layer.spec.mlp == "gated":  # what flashmoe-py calls up is the gate of other projects
            weights |= {
                "gate": weights["up"],
                "gate_bias": weights["up_bias"],
                "up": at("local_expert_up_v", experts, inner, hidden),
                "up_bias": at("local_bias_up_v", experts, inner),
            }
        given = None if self.target.name == "host" else args.stream_ptr
        return _Call(layer, at("tokens", tokens, hidden), Experts(**weights), at("moe_out", tokens, hidden), given)

    def close(self, stream_ptr: int | None) -> None:
        """Wait for the stream, and give everything back; the second time nothing happens."""
        if not self._open:
            return
        memory.wait_for(self.target, stream_ptr)
        self._open = False
        try:
            for layer in self._layers.values():
                layer.close()
        finally:
            self._last = None
            self._layers.clear()
            world.leave()


_by_address: weakref.WeakValueDictionary[int, Moe] = weakref.WeakValueDictionary()


def of_address(token_ids: int) -> Moe:
    """The layer whose routing is at an address.

    Raises:
        SpecError: there is none.
    """
    if (moe := _by_address.get(token_ids)) is None:
        raise SpecError(f"token_ids={token_ids!r} is not valid. Must be handle.mod.get_tIdx(handle.context).")
    moe.require_open()
    return moe
