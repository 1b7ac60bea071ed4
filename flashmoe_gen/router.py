"""The router: which experts a token goes to, and with which weights."""

from __future__ import annotations

import threading
from typing import Any

from . import arrays
from .args import ROUTER_ARGS
from .comm import Communicator
from .errors import CommError, SpecError
from .launch.target import LaunchShape, Prepared, Target, loaded
from .programs import plan_router
from .render import generate
from .spec import MoESpec


class Router:
    """A compiled router kernel; see :meth:`flashmoe_gen.MoELayer.route`. Calls from several threads wait for each other.

    Args:
        spec: what to compute.
        target: where to run.
        comm: whose failure ends a call.
    """

    def __init__(self, spec: MoESpec, target: Target, comm: Communicator) -> None:
        self.spec = spec
        self.lock = threading.RLock()
        self._target, self._comm = target, comm
        self._stream: Any = None  # of the last launch
        self._closed = False
        plan = self._plan = plan_router(target.arch)
        self._kernel = loaded(
            generate(spec, arch=target.arch, kernel="router").compile,
            lambda compiled: target.load(compiled, LaunchShape(plan.threads, plan.shared_bytes)),
        )
        accumulator = 8 if spec.element.accumulator == "double" else 4
        self._logits = target.allocate(spec.max_tokens * spec.num_experts * accumulator)
        self._counters = target.allocate(4 * self._plan.counter_words(spec.max_tokens))
        self._args = ROUTER_ARGS.zeros()
        self._args["logits"] = self._logits.pointer
        self._args["counters"] = self._counters.pointer
        self._args["num_experts"] = spec.num_experts
        self._args["num_groups"] = spec.num_groups
        self._args["top_groups"] = spec.top_groups

    def __call__(
        self,
        x: Any,
        router_weight: Any,
        *,
        logit_bias: Any = None,
        selection_bias: Any = None,
        stream: Any = None,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Route ``x``; arguments, result and errors as :meth:`flashmoe_gen.MoELayer.route`.

        ``out``: arrays for the ids and the weights, contiguous and of the right shapes and dtypes.
        """
        spec, experts = self.spec, self.spec.num_experts
        chosen = self._target.stream(None, x) if stream is None else stream
        where: dict[str, Any] = {"device": self._target.device, "stream": self._target.dlpack_stream(chosen)}
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype, **where, alignment=16)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        shape = (experts, spec.hidden_size)
        views = {
            "x": tokens,
            "router_weight": arrays.checked(router_weight, "router_weight", shape, spec.dtype, **where, alignment=16),
        }
        for name, bias in (("logit_bias", logit_bias), ("selection_bias", selection_bias)):
            if bias is not None:
                views[name] = arrays.checked(bias, name, (experts,), "float32", **where)
        if out is None:
            ids, weights = (arrays.empty_like(x, (count, spec.top_k), dtype) for dtype in ("int32", "float32"))
        else:
            ids, weights = out
        views |= {"topk_ids": arrays.view(ids, "topk_ids"), "topk_weights": arrays.view(weights, "topk_weights")}
        args = self._args.copy()
        for name, view in views.items():
            args[name] = view.pointer
        args["tokens"] = count
        if count:
            wanted = self._plan.blocks(count, experts, 1 << 30) if self._plan.threads else count
            workers = self._target.router_workers(self._kernel, count, wanted)
            self._launch(self._target.prepare(self._kernel, args), workers, chosen, tuple(views.values()))
        return arrays.exported(ids, x), arrays.exported(weights, x)

    def _launch(self, prepared: Prepared, workers: int, stream: Any, views: tuple[arrays.View, ...]) -> None:
        with self.lock, self._comm.launching() as stop:
            if self._closed:
                raise CommError("The layer is closed.")
            self._target.follow(stream, self._stream)
            self._target.launch(self._kernel, prepared, workers, stream, stop)
            self._stream = stream
            if any(view.capsule for view in views):
                self._target.keep(stream, views)

    def close(self) -> None:
        """Give the workspace back."""
        with self.lock:
            self._closed = True
            self._target.synchronize()
            self._logits = self._counters = self._target.allocate(0)
