"""An MoE layer on two ranks, which are threads of this process, on NumPy arrays; checked against the float64 reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import flashmoe_gen as fmg

RANKS, TOKENS = 2, [100, 3]  # ranks may hold any number of tokens up to max_tokens, zero included

spec = fmg.MoESpec(256, 128, num_experts=16, top_k=4, max_tokens=128, world_size=RANKS)
placement = fmg.Placement.default(spec.num_experts, RANKS)
comms = fmg.comm.local_group(RANKS)
layers = [fmg.MoELayer(spec, target="host", comm=comm, placement=placement) for comm in comms]

rng = np.random.default_rng(0)


def random(*shape: int) -> npt.NDArray[Any]:
    return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]), ml_dtypes.bfloat16)


gate, up = random(16, 128, 256), random(16, 128, 256)  # nn.Linear layout: [experts, out, in]
down = random(16, 256, 128)
router_weight = random(16, 256)
inputs = [random(tokens, 256) for tokens in TOKENS]


def run(rank: int) -> float:
    """Route and run one rank's tokens; return the relative error of its y."""
    x, held = inputs[rank], list(placement.local_experts(rank))
    experts = fmg.Experts(gate=gate[held], up=up[held], down=down[held])
    topk_ids, topk_weights = layers[rank].route(x, router_weight)
    y = layers[rank](x, topk_ids, topk_weights, experts)
    want = fmg.reference.moe(spec, x, topk_ids, topk_weights, gate=gate, up=up, down=down)
    return float(np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want))


with ThreadPoolExecutor(RANKS) as ranks:
    for rank, error in enumerate(ranks.map(run, range(RANKS))):
        print(f"rank {rank}: {TOKENS[rank]} tokens, relative error {error:.1e}, {layers[rank].stats()}")
        assert error < 5e-3
