"""From the arguments of a call to the struct that a kernel takes: checked, packed, and kept while it is used."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from . import arrays, env
from .args import MOE_ARGS
from .comm import Communicator
from .errors import SpecError
from .experts import BoundExperts, Experts
from .launch.target import Kernel, Prepared, Target
from .quick import Matrix
from .spec import MoESpec

Args = np.ndarray[Any, Any]

# What differs from call to call, patched into the bytes of a MoEArgs: NumPy takes long for each field of a struct.
_ARRAYS = ("x", "topk_ids", "topk_weights", "y", "num_tokens")
_POINTERS, _TIMEOUT, _TOKENS = struct.Struct("5Q"), struct.Struct("q"), struct.Struct("i")
_AT = {name: int(place[1]) for name, place in (MOE_ARGS.dtype.fields or {}).items()}
_TIMEOUT_AT, _TOKENS_AT = _AT["timeout_ns"], _AT["tokens"]
assert tuple(MOE_ARGS.dtype.names or ())[:5] == _ARRAYS and _AT["num_tokens"] == 32


class PackedCall(NamedTuple):
    """The arguments of one call.

    Attributes:
        prepared: what the launch passes. The next call of the layer changes it.
        result: the array it writes.
        views: all arrays of the call: their addresses in ``args`` are good as long as these live.
        wide_ids: int64 ids that must be narrowed first, or ``None``.
        generation: of the heap whose addresses are in ``args``.
        lent: whether some memory is there only as long as its view.
    """

    prepared: Prepared
    result: Any
    views: tuple[arrays.View, ...]
    wide_ids: arrays.View | None
    generation: int
    lent: bool


class Packer:
    """Packs the calls of one layer, one after the other: each changes the arguments of the one before in place.

    Args:
        spec: the layer.
        target, kernel: where it runs.
        comm: whose heap it uses.
        local_experts: experts of this rank.
        constant: the fields that do not change from call to call.
        narrow_ids: address of room for the ids of a call as int32.
    """

    def __init__(
        self,
        spec: MoESpec,
        target: Target,
        kernel: Kernel,
        comm: Communicator,
        local_experts: int,
        constant: Args,
        narrow_ids: int,
    ) -> None:
        self.spec = spec
        self.constant = constant
        self.narrow_ids = narrow_ids
        self._target, self._kernel, self._comm = target, kernel, comm
        self._local_experts = local_experts
        self._tokens = Matrix(spec.hidden_size, spec.dtype, target.device, alignment=16)
        self._ids, self._wide_ids, self._weights = (
            Matrix(spec.top_k, dtype, target.device) for dtype in ("int32", "int64", "float32")
        )
        self._row_bytes = spec.hidden_size * spec.element.size
        self.forget()

    def forget(self) -> None:
        """Let go of the weights of the last call."""
        self._made: tuple[BoundExperts, int, Prepared] | None = None  # for these weights and this generation of the heap

    def __call__(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        experts: Experts,
        out: Any,
        num_tokens: Any,
        stream: arrays.Ordering = arrays.unordered,
    ) -> PackedCall:
        """Check and pack; arguments and errors as :meth:`flashmoe_gen.MoELayer.__call__`.

        ``stream`` gives DLPack's name of what waits until the memory of foreign arrays is ready.
        """
        spec, device = self.spec, self._target.device
        tokens = self._tokens.checked(x, "x", None, stream)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        wide = arrays.is_torch_int64(topk_ids)
        ids = (self._wide_ids if wide else self._ids).checked(topk_ids, "topk_ids", count, stream)
        weights = self._weights.checked(topk_weights, "topk_weights", count, stream)
        if not isinstance(experts, Experts):
            raise SpecError(f"experts is a {type(experts).__name__}. Must be a flashmoe_gen.Experts.")
        limit, counter = (count, None) if num_tokens is None else self._token_limit(num_tokens, count, stream)
        if self._target.readable:
            _check_ids(ids.numpy()[:limit], spec.num_experts)
        result = arrays.empty_like(x, tokens.shape, spec.dtype) if out is None else out
        y = self._tokens.writable(result, "out", count, stream)
        y_end = y.pointer + count * self._row_bytes
        for name, view, size in (("topk_ids", ids, 8 if wide else 4), ("topk_weights", weights, 4)):
            if y.pointer < view.pointer + count * spec.top_k * size and view.pointer < y_end:
                # x may be: its rows have all been read when out is written
                raise SpecError(f"out shares memory with {name}, which is read while out is written. Pass another array.")
        bound = experts.bind(spec, self._local_experts, device, stream)
        generation, prepared = self._prepared_for(bound)
        args = prepared.bytes
        ids_at = self.narrow_ids if wide else ids.pointer
        _POINTERS.pack_into(args, 0, tokens.pointer, ids_at, weights.pointer, y.pointer, counter.pointer if counter else 0)
        _TIMEOUT.pack_into(args, _TIMEOUT_AT, int(env.timeout_s() * 1e9))
        _TOKENS.pack_into(args, _TOKENS_AT, limit)
        views = (tokens, ids, weights, y, counter) if counter else (tokens, ids, weights, y)
        lent = bound.lent or [view.capsule for view in views] != [None] * len(views)
        return PackedCall(prepared, result, (*views, *bound.views), ids if wide else None, generation, lent)

    def _token_limit(self, num_tokens: Any, count: int, stream: arrays.Ordering) -> tuple[int, arrays.View | None]:
        """Tokens of the call, and where their number is when only the GPU knows it."""
        if isinstance(num_tokens, (int, np.integer)):
            limit = int(num_tokens)
        else:
            found = arrays.checked(num_tokens, "num_tokens", (1,), "int32", device=self._target.device, stream=stream())
            if not self._target.readable:
                return count, found
            limit = int(found.numpy()[0])
        if not 0 <= limit <= count:
            raise SpecError(f"num_tokens={limit} is not valid. Must be between 0 and the {count} tokens of x.")
        return limit, None

    def _prepared_for(self, bound: BoundExperts) -> tuple[int, Prepared]:
        """The heap's generation, and arguments with what stays the same while the weights and the heap do."""
        if self._made is not None and self._made[0] is bound and self._made[1] == self._comm.generation:
            return self._made[1:]
        generation = self._comm.generation  # before the pointers: if they change meanwhile, it is over
        args = self.constant.copy()
        for name, value in (bound.fields | self._comm.heap.arguments()).items():
            args[name] = value
        args["peers"][0, : self.spec.world_size] = self._comm.heap_pointers()
        prepared = self._target.prepare(self._kernel, args)
        self._made = bound, generation, prepared
        return generation, prepared


def _check_ids(ids: np.ndarray[Any, Any], experts: int) -> None:
    if ids.size and ids.max() >= experts:
        token, route = map(int, np.argwhere(ids >= experts)[0])
        raise SpecError(
            f"topk_ids[{token}, {route}]={ids[token, route]} is not valid. Must be below num_experts={experts} "
            "(negative ids are masked routes)."
        )
