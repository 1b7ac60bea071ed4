"""One MoE layer on a GPU with CuPy arrays, called eagerly and from a CUDA graph whose token count changes."""

import cupy as cp

import flashmoe_gen as fmg

spec = fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=256, num_experts=16)
e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size


def random(*shape: int) -> cp.ndarray:
    return (cp.random.standard_normal(shape, dtype=cp.float32) / shape[-1] ** 0.5).astype(spec.element.numpy)


experts = fmg.Experts(gate=random(e, i, h), up=random(e, i, h), down=random(e, h, i))
x, router_weight = random(256, h), random(e, h)
layer = fmg.MoELayer(spec, target="cuda")
topk_ids, topk_weights = layer.route(x, router_weight)  # or your own routing; ids < 0 are masked
y = layer(x, topk_ids, topk_weights, experts)
layer.check()  # waits, and raises what a call on the GPU left behind
print(y.shape, y.dtype, layer.stats())

again, num_tokens = cp.empty_like(x), cp.empty(1, cp.int32)
with cp.cuda.Stream(non_blocking=True) as stream:
    stream.begin_capture()
    layer(x, topk_ids, topk_weights, experts, out=again, num_tokens=num_tokens)
    graph = stream.end_capture()
    for tokens in (256, 3, 100):
        num_tokens.fill(tokens)
        again.fill(0)
        graph.launch(stream)
        assert (again[:tokens] == y[:tokens]).all() and not again[tokens:].any()
layer.check()
