"""One MoE layer on ranks that are processes, each with its own tokens and experts; checked against the float64 reference.

mpirun -n 4 python examples/expert_parallel.py
torchrun --nproc_per_node=2 examples/expert_parallel.py
srun -n 4 python examples/expert_parallel.py

Where there are GPUs every rank takes one, else all run on the CPU (FLASHMOE_TARGET=host: in any case).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

import flashmoe_gen as fmg

comm = fmg.comm.init()  # finds the launcher; a single process is one rank
spec = fmg.MoESpec.preset(
    "qwen3-30b-a3b",
    hidden_size=512,
    intermediate_size=256,
    num_experts=32,
    max_tokens=128,
    world_size=comm.world_size,
)
placement = fmg.Placement.default(spec.num_experts, comm.world_size)
layer = fmg.MoELayer(spec, comm=comm, placement=placement)
xp: Any = importlib.import_module("cupy" if layer.target == "cuda" else "numpy")
if layer.target == "cuda":
    xp.cuda.Device(comm.local_rank).use()


def random(seed: int, *shape: int) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (values / np.float32(shape[-1]) ** 0.5).astype(spec.element.numpy)


e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
weights = {"gate": random(1, e, i, h), "up": random(2, e, i, h), "down": random(3, e, h, i)}
router_weight = random(4, e, h)
x = random(5 + comm.rank, 128 - 29 * comm.rank % 128, h)  # any number of tokens up to max_tokens, zero included

held = list(placement.local_experts(comm.rank))
experts = fmg.Experts(**{name: xp.asarray(array[held]) for name, array in weights.items()})
topk_ids, topk_weights = layer.route(xp.asarray(x), xp.asarray(router_weight))
y = layer(xp.asarray(x), topk_ids, topk_weights, experts)
layer.check()  # waits, and raises what a call on the GPU left behind

y, topk_ids, topk_weights = ((array if xp is np else array.get()) for array in (y, topk_ids, topk_weights))
want = fmg.reference.moe(spec, x, topk_ids, topk_weights, **weights)
error = np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want)
assert error < 5e-3, f"rank {comm.rank}: relative error {error}"
comm.barrier()  # passes when no rank has failed
if comm.rank == 0:
    print(
        f"{comm.world_size} rank(s) on {layer.target}, {e} experts, top {spec.top_k}: y of every rank agrees with the "
        f"float64 reference (relative error of rank 0: {error:.1e}, bound 5e-03)"
    )
layer.close()
comm.close()
