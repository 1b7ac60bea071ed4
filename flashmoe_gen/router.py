"""The router: which experts a token goes to, and with which weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .args import ROUTER_ARGS
from .launch.host import HostKernel
from .render import generate
from .spec import MoESpec


class Router:
    """A compiled router kernel of the host target; see :meth:`flashmoe_gen.MoELayer.route`."""

    def __init__(self, spec: MoESpec, *, processors: int) -> None:
        self.spec = spec
        self._processors = processors
        self._kernel = HostKernel.load(generate(spec, arch="host", kernel="router").compile())

    def __call__(self, x: Any, router_weight: Any, *, logit_bias: Any = None, selection_bias: Any = None) -> tuple[Any, Any]:
        spec = self.spec
        tokens = arrays.checked(x, "x", (None, spec.hidden_size), spec.dtype)
        weight = arrays.checked(router_weight, "router_weight", (spec.num_experts, spec.hidden_size), spec.dtype)
        shape = (tokens.shape[0], spec.top_k)
        ids, weights = arrays.empty_like(x, shape, "int32"), arrays.empty_like(x, shape, "float32")
        args = ROUTER_ARGS.zeros()
        for name, bias in (("logit_bias", logit_bias), ("selection_bias", selection_bias)):
            if bias is not None:
                args[name] = arrays.checked(bias, name, (spec.num_experts,), "float32").pointer
        args["x"] = tokens.pointer
        args["router_weight"] = weight.pointer
        args["topk_ids"] = arrays.view(ids, "topk_ids").pointer
        args["topk_weights"] = arrays.view(weights, "topk_weights").pointer
        args["tokens"] = tokens.shape[0]
        args["num_experts"] = spec.num_experts
        args["num_groups"] = spec.num_groups
        args["top_groups"] = spec.top_groups
        logits = np.empty(shape[0] * spec.num_experts, np.dtype(spec.element.accumulator.replace("float", "float32")))
        args["logits"] = logits.ctypes.data
        self._kernel.launch(args, max(1, min(self._processors, shape[0])))
        return arrays.exported(ids, x), arrays.exported(weights, x)
