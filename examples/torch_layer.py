"""One MoE layer on torch tensors, on torch's current stream; runs on a GPU if there is one, else on the host target."""

from __future__ import annotations

import torch

import flashmoe_gen as fmg

device = "cuda" if torch.cuda.is_available() else "cpu"
spec = fmg.MoESpec(256, 128, num_experts=16, top_k=4, max_tokens=64)
gate, up = (torch.randn(16, 128, 256, device=device).bfloat16() / 16 for _ in range(2))
down = torch.randn(16, 256, 128, device=device).bfloat16() / 11
x, router_weight = torch.randn(64, 256, device=device).bfloat16(), torch.randn(16, 256, device=device).bfloat16() / 16

with fmg.MoELayer(spec, target="cuda" if device == "cuda" else "host") as layer:
    topk_ids, topk_weights = layer.route(x, router_weight)
    y = layer(x, topk_ids, topk_weights, fmg.Experts(gate=gate, up=up, down=down))
    layer.check()
print(y.shape, y.dtype, y.device, layer.target)
