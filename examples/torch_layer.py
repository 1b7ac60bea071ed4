"""One MoE layer on torch tensors, on torch's current stream; runs on a GPU if there is one, else on the host target."""

import math

import torch

import flashmoe_gen as fmg

device = "cuda" if torch.cuda.is_available() else "cpu"
spec = fmg.MoESpec(256, 128, num_experts=16, top_k=4, max_tokens=64)


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device=device) / math.sqrt(shape[-1])).bfloat16()


experts = fmg.Experts(gate=random(16, 128, 256), up=random(16, 128, 256), down=random(16, 256, 128))
x = random(64, 256)
layer = fmg.MoELayer(spec, target="cuda" if x.is_cuda else "host")
topk_ids, topk_weights = layer.route(x, random(16, 256))
y = layer(x, topk_ids, topk_weights, experts)
layer.check()  # waits, and raises what a call on the GPU left behind
print(y.shape, y.dtype, y.device, layer.stats())
