"""One MoE layer on a GPU with CuPy arrays, called eagerly and from a CUDA graph whose token count changes."""

from __future__ import annotations

import cupy as cp

import flashmoe_gen as fmg


def main() -> None:
    spec = fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=256, num_experts=16)
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size

    def random(*shape: int) -> cp.ndarray:
        return (cp.random.standard_normal(shape, dtype=cp.float32) / shape[-1] ** 0.5).astype(spec.element.numpy)

    experts = fmg.Experts(gate=random(e, i, h), up=random(e, i, h), down=random(e, h, i))
    x, router_weight, count = random(256, h), random(e, h), cp.full(1, 256, cp.int32)
    y, stream = cp.empty_like(x), cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    with fmg.MoELayer(spec, target="cuda") as layer, stream:
        topk_ids, topk_weights = layer.route(x, router_weight)
        eager = layer(x, topk_ids, topk_weights, experts)
        stream.begin_capture()
        layer(x, topk_ids, topk_weights, experts, out=y, num_tokens=count)
        graph = stream.end_capture()
        for tokens in (256, 3, 100):
            count.fill(tokens)
            y.fill(0)
            graph.launch(stream)
            assert (y[:tokens] == eager[:tokens]).all() and not y[tokens:].any()
        layer.check()
        print(layer.stats())


if __name__ == "__main__":
    main()
