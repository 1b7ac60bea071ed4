"""Writes the golden files of this folder: outputs of the MoE layers of Hugging Face `transformers`.

Made with transformers 5.23.0 and torch 2.13.0 on Python 3.11; the same versions write the same bytes again.
Run it from the repository root, in an environment with the `goldens` extra:

    pip install -e '.[goldens]'
    python tests/golden/make_goldens.py

Each `.npz` holds one tiny layer in evaluation mode (shared experts set to zero, so that they add nothing):
    config                            JSON text as in a model's config.json
    x                                 [T, H]
    router_weight                     [E, H]
    logit_bias, selection_bias        [E], where the model has them
    gate, up / down                   [E, I, H] / [E, H, I], the nn.Linear layout
    gate_bias, up_bias / down_bias    [E, I] / [E, H], where the model has them
    topk_ids, topk_weights            [T, k], as the module's router returned them (order is the module's)
    y                                 [T, H], the routed output in float64

Modules run in float64; most routers of transformers compute scores in float32 whatever the input is. All inputs lie on
a coarse grid: exact in float16 (which keeps the files small) and their router logits are exact in float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig

TOKENS = 12
HIDDEN, INTERMEDIATE = 48, 24
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One golden file: a module class of transformers and the config fields that matter."""

    name: str
    model_type: str
    module: str  # "package.ClassName" below transformers.models
    num_experts: int
    fields: dict[str, Any] = field(default_factory=dict)
    width: str = "moe_intermediate_size"  # the config field of I
    experts: str = "num_experts"  # the config field of E
    layout: str = "concat"  # of gate_up_proj: concat [2I, H], transposed [H, 2I] or interleaved [H, 2I]
    logit_bias: bool = False
    selection_bias: bool = False
    expert_bias: bool = False
    x_deviation: float = 1.0


def _cases() -> Iterator[Case]:
    for renormalize in (False, True):
        suffix = "norm" if renormalize else "plain"
        top = {"num_experts_per_tok": 3, "norm_topk_prob": renormalize}
        yield Case(f"qwen3_moe_{suffix}", "qwen3_moe", "qwen3_moe.Qwen3MoeSparseMoeBlock", 6, top)
        yield Case(
            f"qwen2_moe_{suffix}",
            "qwen2_moe",
            "qwen2_moe.Qwen2MoeSparseMoeBlock",
            6,
            {**top, "shared_expert_intermediate_size": 40},
        )
        yield Case(f"olmoe_{suffix}", "olmoe", "olmoe.OlmoeSparseMoeBlock", 6, top, width="intermediate_size")

    local: dict[str, Any] = {"width": "intermediate_size", "experts": "num_local_experts"}
    mixtral = "mixtral.MixtralSparseMoeBlock"
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"):
        fields = {"num_experts_per_tok": 2, "hidden_act": activation, "router_jitter_noise": 0.1}
        yield Case(f"mixtral_{activation}", "mixtral", mixtral, 5, fields, **local)
    yield Case("granitemoe", "granitemoe", "granitemoe.GraniteMoeMoE", 6, {"num_experts_per_tok": 3}, **local)

    for model_type in ("llama4", "llama4_text"):  # the first nests its text_config
        top_k = 1 if model_type == "llama4" else 2
        fields = {"num_experts_per_tok": top_k, "num_hidden_layers": 2}
        yield Case(model_type, model_type, "llama4.Llama4TextMoe", 4, fields, layout="transposed", **local)

    gpt_oss: dict[str, Any] = {**local, "layout": "interleaved", "logit_bias": True, "expert_bias": True}
    gpt_oss["x_deviation"] = 3.0  # large enough for the limit of 7 to act
    limits: dict[str, dict[str, Any]] = {"gpt_oss": {}, "gpt_oss_limits": {"swiglu_limit": 1.5, "swiglu_alpha": 1.25}}
    for name, fields in limits.items():
        yield Case(name, "gpt_oss", "gpt_oss.GptOssMLP", 5, {"num_experts_per_tok": 3, **fields}, **gpt_oss)

    deepseek: dict[str, Any] = {"num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
    methods: dict[str, dict[str, Any]] = {
        "greedy": {"n_group": 1, "topk_group": 1},
        "group_limited_greedy": {"n_group": 4, "topk_group": 2},
    }
    for method, fields in methods.items():
        yield Case(
            f"deepseek_v2_{method}",
            "deepseek_v2",
            "deepseek_v2.DeepseekV2Moe",
            8,
            {**deepseek, **fields, "topk_method": method},
            experts="n_routed_experts",
        )
    biased: dict[str, dict[str, Any]] = {
        "deepseek_v3_groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
        "deepseek_v3_plain": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        "glm4_moe": {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    }
    for name, fields in biased.items():
        family, module = ("glm4_moe", "Glm4MoeMoE") if name == "glm4_moe" else ("deepseek_v3", "DeepseekV3MoE")
        yield Case(
            name,
            family,
            f"{family}.{module}",
            8,
            {**deepseek, **fields},
            experts="n_routed_experts",
            selection_bias=True,
        )


def _inputs(case: Case, rng: np.random.Generator) -> Arrays:
    def grid(step: float, deviation: float, *shape: int) -> npt.NDArray[np.float16]:
        return (np.round(rng.normal(0.0, deviation, shape) / step) * step).astype(np.float16)

    experts = case.num_experts
    arrays = {
        "x": grid(1 / 16, case.x_deviation, TOKENS, HIDDEN),
        "router_weight": grid(1 / 64, 0.2, experts, HIDDEN),
        "gate": grid(1 / 32, 0.25, experts, INTERMEDIATE, HIDDEN),
        "up": grid(1 / 32, 0.25, experts, INTERMEDIATE, HIDDEN),
        "down": grid(1 / 32, 0.25, experts, HIDDEN, INTERMEDIATE),
    }
    if case.logit_bias:
        arrays["logit_bias"] = grid(1 / 64, case.x_deviation, experts)
    if case.selection_bias:
        arrays["selection_bias"] = grid(1 / 256, 0.2, experts)
    if case.expert_bias:
        arrays["gate_bias"] = grid(1 / 32, 0.5, experts, INTERMEDIATE)
        arrays["up_bias"] = grid(1 / 32, 0.5, experts, INTERMEDIATE)
        arrays["down_bias"] = grid(1 / 32, 0.5, experts, HIDDEN)
    return arrays


def _gate_up(layout: str, gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gate and up, both [E, I, ...], in the module's layout, the 2I axis still second."""
    if layout == "interleaved":
        return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
    return np.concatenate([gate, up], axis=1)


def _state(case: Case, arrays: Arrays) -> Arrays:
    """The module's expert parameters by name."""
    gate_up, down = _gate_up(case.layout, arrays["gate"], arrays["up"]), arrays["down"]
    if case.layout != "concat":
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    state = {"gate_up_proj": gate_up, "down_proj": down}
    if case.expert_bias:
        state["gate_up_proj_bias"] = _gate_up(case.layout, arrays["gate_bias"], arrays["up_bias"])
        state["down_proj_bias"] = arrays["down_bias"]
    return state


def _copy(parameter: torch.Tensor, values: npt.NDArray[Any]) -> None:
    assert parameter.shape == values.shape, (parameter.shape, values.shape)
    parameter.copy_(torch.from_numpy(values.astype(np.float64)))


def _config(case: Case) -> Any:
    fields = {"hidden_size": HIDDEN, case.width: INTERMEDIATE, case.experts: case.num_experts, **case.fields}
    # attention must divide H; its sizes do not matter here
    fields.update(num_attention_heads=4, num_key_value_heads=2)
    if case.model_type == "llama4":
        return AutoConfig.for_model("llama4", dtype="float64", text_config=fields)
    return AutoConfig.for_model(case.model_type, dtype="float64", **fields)


@torch.no_grad()
def _run(case: Case) -> Arrays:
    rng = np.random.default_rng(list(case.name.encode()))
    arrays = _inputs(case, rng)
    config = _config(case)
    layer_config = config.text_config if case.model_type == "llama4" else config
    layer_config._experts_implementation = "eager"

    package, class_name = case.module.split(".")
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    module = getattr(modeling, class_name)(layer_config).double().eval()
    for name, parameter in module.named_parameters():
        if name.startswith("shared"):
            parameter.zero_()
    for name, values in _state(case, arrays).items():
        _copy(getattr(module.experts, name), values)
    router = module.gate if hasattr(module, "gate") else module.router
    _copy(router.weight, arrays["router_weight"])
    if case.logit_bias:
        _copy(router.bias, arrays["logit_bias"])
    if case.selection_bias:
        _copy(router.e_score_correction_bias, arrays["selection_bias"])

    routed: list[Any] = []
    router.register_forward_hook(lambda _module, _args, output: routed.append(output))
    out = module(torch.from_numpy(arrays["x"].astype(np.float64))[None])
    y = (out[0] if isinstance(out, tuple) else out).reshape(TOKENS, HIDDEN)
    if class_name == "Llama4TextMoe":  # returns a dense [T, E] with zeros outside the chosen
        weights, ids = routed[0][0].topk(layer_config.num_experts_per_tok, dim=1)
    else:
        _logits, weights, ids = routed[0]
    return {
        "config": np.array(config.to_json_string()),
        **arrays,
        "topk_ids": ids.numpy().astype(np.int32),
        "topk_weights": weights.numpy(),
        "y": y.numpy(),
    }


def main() -> None:
    folder = Path(__file__).parent
    for case in _cases():
        path = folder / f"{case.name}.npz"
        arrays = _run(case)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        print(f"{path.name:40} {path.stat().st_size:6} bytes, topk_weights {arrays['topk_weights'].dtype}")


if __name__ == "__main__":
    main()
