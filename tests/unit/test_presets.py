"""The presets: their sizes against published parameter counts, their routing against the config reader."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from flashmoe_gen.errors import SpecError
from flashmoe_gen.hf_config import spec_fields
from flashmoe_gen.presets import PRESETS, SHARED_EXPERTS, preset_fields
from flashmoe_gen.spec import MoESpec

# MoE layers and billions of parameters of the whole model; almost all of them are routed experts
PUBLISHED = {
    "deepseek-v2": (59, 236),
    "deepseek-v2-lite": (26, 15.7),
    "deepseek-v3": (58, 671),
    "glm-4.5-air": (45, 106),
    "gpt-oss-120b": (36, 117),
    "gpt-oss-20b": (24, 20.9),
    "granite-3.1-3b-a800m": (32, 3.3),
    "llama4-maverick": (24, 400),
    "llama4-scout": (48, 109),
    "mixtral-8x22b": (56, 141),
    "mixtral-8x7b": (32, 46.7),
    "olmoe-1b-7b": (16, 6.92),
    "qwen2-57b-a14b": (28, 57.4),
    "qwen3-235b-a22b": (94, 235),
    "qwen3-30b-a3b": (48, 30.5),
}

NOAUX = {"norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v2": {"model_type": "deepseek_v2", **LIMITED},
    "deepseek-v2-lite": {"model_type": "deepseek_v2", "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **NOAUX,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    "glm-4.5-air": {"model_type": "glm4_moe", **NOAUX, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "gpt-oss-120b": {"model_type": "gpt_oss"},
    "gpt-oss-20b": {"model_type": "gpt_oss", "swiglu_limit": 7.0},
    "granite-3.1-3b-a800m": {"model_type": "granitemoe"},
    "llama4-maverick": {"model_type": "llama4_text"},
    "llama4-scout": {"model_type": "llama4_text"},
    "mixtral-8x22b": {"model_type": "mixtral"},
    "mixtral-8x7b": {"model_type": "mixtral"},
    "olmoe-1b-7b": {"model_type": "olmoe", "norm_topk_prob": False},
    "qwen2-57b-a14b": {"model_type": "qwen2_moe", "norm_topk_prob": False, "shared_expert_intermediate_size": 20480},
    "qwen3-235b-a22b": {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}


@pytest.mark.parametrize("name", PRESETS)
def test_expert_parameters_make_up_the_model(name: str) -> None:
    layers, billions = PUBLISHED[name]
    spec = MoESpec.preset(name, max_tokens=1)
    routed = layers * spec.num_experts * 3 * spec.hidden_size * spec.intermediate_size
    assert 0.85 < routed / (billions * 1e9) < 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_agrees_with_the_config_reader(name: str) -> None:
    fields = PRESETS[name]
    sizes = {
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "moe_intermediate_size": fields["intermediate_size"],
        "num_experts": fields["num_experts"],
        "num_experts_per_tok": fields["top_k"],
    }
    config = {**sizes, **CONFIGS[name]}
    assert MoESpec.preset(name, max_tokens=1) == MoESpec(**spec_fields(config), max_tokens=1)


def test_overrides() -> None:
    spec = MoESpec.preset("qwen3-30b-a3b", max_tokens=64, world_size=2, dtype="float16", capacity=8)
    assert (spec.max_tokens, spec.world_size, spec.dtype, spec.capacity) == (64, 2, "float16", 8)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k) == (2048, 768, 128, 8)


def test_unknown_name_lists_all_and_hints() -> None:
    with pytest.raises(SpecError, match=r"'mixtral-8x7'.*Did you mean 'mixtral-8x7b'\?") as caught:
        preset_fields("mixtral-8x7")
    assert all(repr(name) in str(caught.value) for name in PRESETS)
    with pytest.raises(SpecError, match="Did you mean 'deepseek-v3'"):
        MoESpec.preset("DeepSeek-V3", max_tokens=1)
    with pytest.raises(SpecError, match=r"preset 'zzz' is not known\. Must be one of"):
        preset_fields("zzz")


def test_fields_are_a_copy() -> None:
    preset_fields("mixtral-8x7b")["hidden_size"] = 1
    assert PRESETS["mixtral-8x7b"]["hidden_size"] == 4096


@pytest.mark.parametrize("name", PRESETS)
def test_shared_experts_are_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    preset_fields(name)
    expected = [("flashmoe_gen", logging.WARNING)] * (name in SHARED_EXPERTS)
    assert [(record.name, record.levelno) for record in caplog.records] == expected
