"""The router: which experts a token goes to, and with which weights."""

from __future__ import annotations

from typing import Any

from . import arrays
from .args import ROUTER_ARGS
from .errors import SpecError
from .launch.target import Target
from .plan import plan_router
from .render import generate
from .spec import MoESpec


class Router:
    """A compiled router kernel; see :meth:`flashmoe_gen.MoELayer.route`.

    Args:
        spec: what to compute.
        target: where to run.
    """

    def __init__(self, spec: MoESpec, target: Target) -> None:
        self.spec = spec
        self._target = target
        self._plan = plan_router(target.arch)
        compiled = generate(spec, arch=target.arch, kernel="router").compile()
        self._kernel = target.load(compiled, threads=self._plan.threads, shared_bytes=self._plan.shared_bytes)
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
        self, x: Any, router_weight: Any, *, logit_bias: Any = None, selection_bias: Any = None, stream: Any = None
    ) -> tuple[Any, Any]:
        """Route ``x``; arguments, result and errors as :meth:`flashmoe_gen.MoELayer.route`."""
        spec, device = self.spec, self._target.device
        experts = spec.num_experts
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype, device=device, alignment=16)
        count = tokens.shape[0]
        if count > spec.max_tokens:
            raise SpecError(f"x has {count} tokens. Must be at most max_tokens={spec.max_tokens}.")
        shape = (experts, spec.hidden_size)
        weight = arrays.checked(router_weight, "router_weight", shape, spec.dtype, device=device, alignment=16)
        args = self._args.copy()
        for name, bias in (("logit_bias", logit_bias), ("selection_bias", selection_bias)):
            if bias is not None:
                args[name] = arrays.checked(bias, name, (experts,), "float32", device=device).pointer
        ids, weights = (arrays.empty_like(x, (count, spec.top_k), dtype) for dtype in ("int32", "float32"))
        args["x"] = tokens.pointer
        args["router_weight"] = weight.pointer
        args["topk_ids"] = arrays.view(ids, "topk_ids").pointer
        args["topk_weights"] = arrays.view(weights, "topk_weights").pointer
        args["tokens"] = count
        if count:
            wanted = self._plan.blocks(count, experts, 1 << 30) if self._plan.threads else count
            workers = self._target.router_workers(self._kernel, count, wanted)
            chosen = self._target.stream(None, x) if stream is None else stream
            self._target.launch(self._kernel, args, workers, chosen)
        return arrays.exported(ids, x), arrays.exported(weights, x)
