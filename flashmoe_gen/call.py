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
from .spec import MoESpec

Args = np.ndarray[Any, Any]

# What differs from call to call, patched into the bytes of a MoEArgs: NumPy takes long for each field of a struct.
_ARRAYS = ("x", "topk_ids", "topk_weights", "y", "num_tokens")
_POINTERS, _TIMEOUT, _TOKENS = struct.Struct("5Q"), struct.Struct("q"), struct.Struct("i")
_AT = {name: int(place[1]) for name, place in (MOE_ARGS.dtype.fields or {}).items()}
assert tuple(MOE_ARGS.dtype.names or ())[:5] == _ARRAYS and _AT["num_tokens"] == 32


class PackedCall(NamedTuple):
    """The arguments of one call.

    Attributes:
        args: a ``MoEArgs``.
        prepared: what the launch passes: ``args``, and what goes with it.
        result: the array it writes.
        views: all arrays of the call: their addresses in ``args`` are good as long as these live.
        wide_ids: int64 ids that must be narrowed first, or ``None``.
        generation: of the heap whose addresses are in ``args``.
        lent: whether some memory is there only as long as its view.
    """

    args: Args
    prepared: Prepared
    result: Any
    views: tuple[arrays.View, ...]
    wide_ids: arrays.View | None
    generation: int
    lent: bool


class Packer:
    """Packs the calls of one layer.

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
        self._prepared: tuple[BoundExperts | None, int, bytes, Prepared]
        self.forget()

    def forget(self) -> None:
        """Let go of the weights of the last call."""
        self._prepared = None, -1, b"", Prepared(self.constant)  # weights, generation of the heap, and what is prepared for them

    def __call__(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        experts: Experts,
        out: Any,
        num_tokens: Any,
        stream: int = arrays.NO_STREAM,
    ) -> PackedCall:
        """Check and pack; arguments and errors as :meth:`flashmoe_gen.MoELayer.__call__`.

        ``stream`` is for DLPack: what waits until the memory of foreign arrays is ready.
        """
        spec = self.spec
        where: dict[str, Any] = {"device": self._target.device, "stream": stream}
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype, **where, alignment=16)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        wide = arrays.is_torch_int64(topk_ids)
        ids = arrays.checked(topk_ids, "topk_ids", (count, spec.top_k), "int64" if wide else "int32", **where)
        weights = arrays.checked(topk_weights, "topk_weights", (count, spec.top_k), "float32", **where)
        if not isinstance(experts, Experts):
            raise SpecError(f"experts is a {type(experts).__name__}. Must be a flashmoe_gen.Experts.")
        limit, counter = _token_limit(num_tokens, count, where)
        if self._target.device == "cpu":
            _check_ids(ids.numpy()[:limit], spec.num_experts)
        result = arrays.empty_like(x, tokens.shape, spec.dtype) if out is None else out
        y = arrays.writable(result, "out", tokens.shape, spec.dtype, **where, alignment=16)
        y_bytes = count * spec.hidden_size * spec.element.size
        for name, view, size in (("topk_ids", ids, 8 if wide else 4), ("topk_weights", weights, 4)):
            if y.pointer < view.pointer + count * spec.top_k * size and view.pointer < y.pointer + y_bytes:
                # x may be: its rows have all been read when out is written
                raise SpecError(f"out shares memory with {name}, which is read while out is written. Pass another array.")
        bound = experts.bind(spec, self._local_experts, **where)
        generation, image, prepared = self._image_for(bound)
        args = bytearray(image)
        ids_at = self.narrow_ids if wide else ids.pointer
        _POINTERS.pack_into(args, 0, tokens.pointer, ids_at, weights.pointer, y.pointer, counter.pointer if counter else 0)
        _TIMEOUT.pack_into(args, _AT["timeout_ns"], int(env.timeout_s() * 1e9))
        _TOKENS.pack_into(args, _AT["tokens"], limit)
        views = (tokens, ids, weights, y, counter) if counter else (tokens, ids, weights, y)
        lent = bound.lent or any(view.capsule is not None for view in views)
        packed = np.frombuffer(args, MOE_ARGS.dtype)
        return PackedCall(packed, prepared.beside(packed), result, (*views, *bound.views), ids if wide else None, generation, lent)

    def _image_for(self, bound: BoundExperts) -> tuple[int, bytes, Prepared]:
        """The arguments that stay the same while the weights and the heap do, and what goes with them."""
        made_for, generation, image, prepared = self._prepared
        if made_for is not bound or generation != self._comm.generation:
            generation = self._comm.generation  # before the pointers: if they change meanwhile, it is over
            args = self.constant.copy()
            for name, value in (bound.fields | self._comm.heap.arguments()).items():
                args[name] = value
            args["peers"][0, : self.spec.world_size] = self._comm.heap_pointers()
            image, prepared = args.tobytes(), self._target.prepare(self._kernel, args)
            self._prepared = bound, generation, image, prepared
        return generation, image, prepared


def _check_ids(ids: np.ndarray[Any, Any], experts: int) -> None:
    if ids.size and ids.max() >= experts:
        token, route = map(int, np.argwhere(ids >= experts)[0])
        raise SpecError(
            f"topk_ids[{token}, {route}]={ids[token, route]} is not valid. Must be below num_experts={experts} "
            "(negative ids are masked routes)."
        )


def _token_limit(num_tokens: Any, count: int, where: dict[str, Any]) -> tuple[int, arrays.View | None]:
    """Tokens of the call, and where their number is when only the GPU knows it."""
    if num_tokens is None:
        return count, None
    if isinstance(num_tokens, (int, np.integer)):
        limit = int(num_tokens)
    else:
        found = arrays.checked(num_tokens, "num_tokens", (1,), "int32", **where)
        if where["device"] != "cpu":
            return count, found
        limit = int(found.numpy()[0])
    if not 0 <= limit <= count:
        raise SpecError(f"num_tokens={limit} is not valid. Must be between 0 and the {count} tokens of x.")
    return limit, None
