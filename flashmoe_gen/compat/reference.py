"""flashmoe-py's judge of a layer; here :func:`flashmoe_gen.reference.moe`, in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference
from . import memory
from .arguments import ContextHandle, ForwardArgs, InitArgs, RefForwardArgs, of_kind
from .moe import of_address

__all__ = ["RefForwardArgs", "forward", "initialize"]


class Judge:
    """Computes what a layer should have."""

    def __init__(self, args: InitArgs) -> None:
        args.spec(1)
        self._args = args

    def forward(self, token_ids: int, f_args: ForwardArgs, r_args: RefForwardArgs) -> None:
        moe = of_address(token_ids)
        memory.wait_for(moe.target, f_args.stream_ptr)
        spec = self._args.spec(1, swish_alpha=f_args.swish_alpha, swish_beta=f_args.swish_beta)
        experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size

        def at(args: object, name: str, *shape: int) -> Any:
            return memory.array_at(moe.target, name, getattr(args, name), shape, spec.dtype)

        weights = {
            "up": at(r_args, "expert_up", experts, inner, hidden),
            "up_bias": at(r_args, "bias_up", experts, inner),
            "down": at(r_args, "expert_down", experts, hidden, inner),
            "down_bias": at(r_args, "bias_down", experts, hidden),
        }
        if spec.mlp == "gated":
            weights |= {
                "gate": weights["up"],
                "gate_bias": weights["up_bias"],
                "up": at(r_args, "expert_up_v", experts, inner, hidden),
                "up_bias": at(r_args, "bias_up_v", experts, inner),
            }
        out = at(r_args, "ref_out", spec.max_tokens, hidden)
        tokens = at(f_args, "tokens", spec.max_tokens, hidden)
        y = reference.moe(
            spec,
            *map(memory.to_host, (tokens, moe.ids, moe.weights)),
            **{name: memory.to_host(array) for name, array in weights.items()},
        ).astype(spec.element.numpy)
        if isinstance(out, np.ndarray):
            out[...] = y
        else:
            out.set(y)


def initialize(arg: InitArgs) -> ContextHandle:
    """Make the reference of a layer.

    Raises:
        SpecError: a field of ``arg`` is not valid.
    """
    return ContextHandle(Judge(arg), None)


def forward(handle: ContextHandle, token_ids: int, f_args: ForwardArgs, r_args: RefForwardArgs) -> None:
    """Write what the call ``f_args`` should compute with the routing at ``token_ids``; waits for the stream of the call.

    Raises:
        SpecError: an address is not valid.
        CommError: the layer's handle has been finalised.
    """
    of_kind(handle, Judge, "reference.initialize()").forward(token_ids, f_args, r_args)
