"""The spec of a model from its config.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe_gen.errors import SpecError, UnsupportedError
from flashmoe_gen.hf_config import _FAMILIES, shared_experts, spec_fields
from flashmoe_gen.spec import MoESpec

SIZES = {"hidden_size": 64, "num_experts_per_tok": 2, "torch_dtype": "float16"}
MOE_SIZES = {**SIZES, "moe_intermediate_size": 32, "intermediate_size": 999, "num_experts": 8}
LOCAL_SIZES = {**SIZES, "intermediate_size": 32, "num_local_experts": 8}
ROUTED_SIZES = {**SIZES, "moe_intermediate_size": 32, "n_routed_experts": 8}
NOAUX = {"norm_topk_prob": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**ROUTED_SIZES, "n_shared_experts": 2},
    "deepseek_v3": {**ROUTED_SIZES, **NOAUX, "n_shared_experts": 1},
    "glm4_moe": {**ROUTED_SIZES, **NOAUX, "n_shared_experts": 1},
    "gpt_oss": LOCAL_SIZES,
    "granitemoe": LOCAL_SIZES,
    "llama4_text": LOCAL_SIZES,
    "mixtral": LOCAL_SIZES,
    "olmoe": {**SIZES, "intermediate_size": 32, "num_experts": 8},
    "qwen2_moe": {**MOE_SIZES, "shared_expert_intermediate_size": 48},
    "qwen3_moe": MOE_SIZES,
}
SHARED = {"deepseek_v2": 2, "deepseek_v3": 1, "glm4_moe": 1, "llama4_text": 1, "qwen2_moe": 1}


def config_of(model_type: str, /, **changes: Any) -> dict[str, Any]:
    """A config with some fields changed; ``...`` removes a field."""
    fields = {"model_type": model_type, **CONFIGS[model_type], **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def spec_of(model_type: str, /, **changes: Any) -> MoESpec:
    return MoESpec.from_hf_config(config_of(model_type, **changes), max_tokens=16)


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) | {"llama4", "phimoe"} == set(_FAMILIES)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_sizes_and_dtype(model_type: str) -> None:
    spec = spec_of(model_type)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k) == (64, 32, 8, 2)
    assert spec.dtype == "float16"
    assert spec.capacity is None


@pytest.mark.parametrize("model_type", CONFIGS)
def test_shared_experts_are_counted_and_logged(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(model_type)
    count = SHARED.get(model_type, 0)
    assert shared_experts(config) == count
    assert not caplog.records
    spec_fields(config)
    logged = [(record.name, record.levelno) for record in caplog.records]
    assert logged == [("flashmoe_gen", logging.WARNING)] * (count > 0)
    assert all(f"{count} shared expert" in record.getMessage() for record in caplog.records)


def test_shared_experts_null_is_none_and_absence_is_not() -> None:
    assert shared_experts(config_of("deepseek_v3", n_shared_experts=None)) == 0
    assert shared_experts(config_of("deepseek_v3", n_shared_experts=...)) == 1
    assert shared_experts(config_of("qwen2_moe", shared_expert_intermediate_size=0)) == 0


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (..., False)])
def test_norm_topk_prob(model_type: str, value: Any, expected: bool) -> None:
    assert spec_of(model_type, norm_topk_prob=value).renormalize is expected


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_families_that_always_renormalize(model_type: str) -> None:
    spec = spec_of(model_type)
    assert spec.renormalize and spec.scoring == "softmax"


def test_gpt_oss() -> None:
    spec = spec_of("gpt_oss", hidden_act="anything, the model does not read it")
    assert (spec.activation, spec.swish_beta, spec.gate_limit, spec.up_offset) == ("silu", 1.702, 7.0, 1.0)
    assert spec.swish_alpha == 1 / 1.702
    assert spec.bias
    changed = spec_of("gpt_oss", swiglu_limit=5, swiglu_alpha=2)
    assert (changed.gate_limit, changed.swish_beta, changed.swish_alpha) == (5.0, 2.0, 0.5)


def test_llama4_weights_the_input() -> None:
    spec = spec_of("llama4_text")
    assert (spec.weight_on, spec.scoring, spec.renormalize) == ("input", "sigmoid", False)


def test_llama4_nested() -> None:
    text = config_of("llama4_text", torch_dtype=..., model_type=..., hidden_act="gelu", extra=None)
    outer = {"model_type": "llama4", "torch_dtype": "float16", "hidden_act": "silu", "text_config": text}
    spec = MoESpec.from_hf_config(outer, max_tokens=16)
    assert (spec.dtype, spec.activation, spec.weight_on) == ("float16", "gelu", "input")
    assert shared_experts(outer) == 1
    del text["hidden_size"]
    with pytest.raises(SpecError, match=r"hidden_size is missing from text_config of the config"):
        spec_fields(outer)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_sigmoid_families(model_type: str) -> None:
    spec = spec_of(model_type, topk_method="noaux_tc", scoring_func="sigmoid")
    assert (spec.scoring, spec.renormalize, spec.group_score) == ("sigmoid", True, "top2_sum")
    assert (spec.num_groups, spec.top_groups, spec.routed_scale) == (4, 2, 2.5)
    assert not spec_of(model_type, norm_topk_prob=False).renormalize


@pytest.mark.parametrize("field", ["n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"])
def test_sigmoid_families_do_not_guess(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field} is missing"):
        spec_of("deepseek_v3", **{field: None})


def test_deepseek_v2() -> None:
    greedy = spec_of("deepseek_v2", topk_method="greedy", n_group=4, topk_group=2, routed_scaling_factor=1)
    assert (greedy.scoring, greedy.renormalize, greedy.num_groups, greedy.routed_scale) == ("softmax", False, 1, 1.0)
    limited = spec_of(
        "deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    )
    assert (limited.num_groups, limited.top_groups, limited.group_score) == (4, 2, "max")
    assert (limited.renormalize, limited.routed_scale) == (False, 16.0)
    assert spec_of("deepseek_v2", topk_method=..., n_group=None).num_groups == 1


def test_deepseek_v2_renormalization_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert not spec_of("deepseek_v2", norm_topk_prob=True).renormalize
    assert "norm_topk_prob=True" in caplog.text


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("linear", "identity"),
        ("quick_gelu", "silu"),
        (..., "silu"),
    ],
)
def test_hidden_act(hidden_act: Any, activation: str) -> None:
    spec = spec_of("mixtral", hidden_act=hidden_act)
    assert spec.activation == activation
    assert spec.swish_beta == (1.702 if hidden_act == "quick_gelu" else 1.0)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float32", "dtype": "float64"}, "float64"),
        ({"torch_dtype": None}, "bfloat16"),
        ({"torch_dtype": ...}, "bfloat16"),
    ],
)
def test_dtype(fields: dict[str, Any], dtype: str) -> None:
    assert spec_of("mixtral", **fields).dtype == dtype


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mixtral", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("mixtral", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
        ("mixtral", {"dtype": "int8"}, "dtype='int8'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "scoring_func='sqrtsoftplus'"),
    ],
)
def test_unsupported_names_field_and_value(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        spec_of(model_type, **changes)


def test_phimoe_names_the_sparse_mixer() -> None:
    config = {**LOCAL_SIZES, "model_type": "phimoe", "router_jitter_noise": 0.01}
    with pytest.raises(UnsupportedError, match=r"router_jitter_noise=0\.01 .*model_type='phimoe'.* sparsemixer"):
        spec_fields(config)


def test_unknown_model_type_lists_the_supported() -> None:
    with pytest.raises(UnsupportedError, match=r"model_type='jamba'.*'mixtral'") as caught:
        spec_fields({**LOCAL_SIZES, "model_type": "jamba"})
    assert "phimoe" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="model_type='jamba'"):
        shared_experts({"model_type": "jamba"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", ..., "hidden_size is missing from the config"),
        ("hidden_size", "64", "hidden_size='64' in the config is not valid. Must be an integer"),
        ("num_local_experts", True, "num_local_experts=True .* Must be an integer"),
        ("num_local_experts", ..., "num_experts is missing"),
        ("num_experts_per_tok", None, "num_experts_per_tok is missing"),
        ("hidden_act", 3, "hidden_act=3 .* Must be a string"),
        ("model_type", ..., "model_type is missing"),
        ("hidden_size", 63, "hidden_size=63"),
    ],
)
def test_bad_fields(field: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of("mixtral", **{field: value})


def test_flags_must_be_booleans() -> None:
    with pytest.raises(SpecError, match=r"norm_topk_prob=1 .* Must be true or false"):
        spec_of("qwen3_moe", norm_topk_prob=1)


def test_reads_file_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("mixtral")))
    fields = spec_fields(config_of("mixtral"))
    assert spec_fields(path) == spec_fields(str(path)) == spec_fields(tmp_path) == fields
    spec = MoESpec.from_hf_config(path, max_tokens=7, world_size=2, dtype="bfloat16")
    assert (spec.max_tokens, spec.world_size, spec.dtype) == (7, 2, "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "Must hold a JSON object"),
        (b"{}", "model_type is missing"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    for function in (spec_fields, shared_experts):
        with pytest.raises(SpecError, match=message) as caught:
            function(path)
        assert str(path) in str(caught.value)


def test_not_a_path_or_dict() -> None:
    with pytest.raises(SpecError, match="config=3 is not valid"):
        spec_fields(3)  # type: ignore[arg-type]


# --- what a config must not say silently ---

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@pytest.mark.parametrize("other", [*EXPERTS, "num_experts_per_token", "experts_per_token"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_names_of_one_thing(model_type: str, other: str) -> None:
    right = 8 if other in EXPERTS else 2
    assert spec_of(model_type, **{other: right}) == spec_of(model_type)
    assert spec_of(
        model_type, **{other: None, **{k: v for k, v in CONFIGS[model_type].items() if k == other}}
    ) == spec_of(model_type)
    if other in CONFIGS[model_type]:
        return
    with pytest.raises(
        SpecError, match=rf"\w+={right} and {other}=16 in the config contradict|{other}=16 and \w+={right} in the"
    ):
        spec_of(model_type, **{other: 16})


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe"])
def test_families_that_do_not_read_moe_intermediate_size(model_type: str) -> None:
    assert spec_of(model_type, moe_intermediate_size=32) == spec_of(model_type)
    with pytest.raises(
        SpecError, match="intermediate_size=32 and moe_intermediate_size=64 in the config contradict each other"
    ):
        spec_of(model_type, moe_intermediate_size=64)
    with pytest.raises(SpecError, match="intermediate_size is missing from the config"):
        spec_of(model_type, intermediate_size=..., moe_intermediate_size=32)


def test_two_dtypes(caplog: pytest.LogCaptureFixture) -> None:
    assert spec_of("mixtral", dtype="torch.float16").dtype == "float16" and not caplog.records
    assert spec_of("mixtral", dtype="float32").dtype == "float32"
    assert "dtype='float32' in the config counts" in caplog.text and "torch_dtype='float16' does not" in caplog.text
    nested = {
        "model_type": "llama4",
        "dtype": "float32",
        "text_config": {**LOCAL_SIZES, "torch_dtype": ..., "dtype": "bfloat16"},
    }
    del nested["text_config"]["torch_dtype"]  # type: ignore[attr-defined]
    with pytest.raises(
        SpecError, match="dtype='float32' in the config and dtype='bfloat16' in its text_config contradict"
    ):
        spec_fields(nested)


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("model_type", [*CONFIGS, "llama4"])
def test_a_quantised_model_is_a_warning(model_type: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    quantised = {name: {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    configs = [config_of(model_type, **quantised)] if model_type != "llama4" else []
    if model_type == "llama4":
        text = {key: value for key, value in config_of("llama4_text").items() if key != "model_type"}
        configs = [
            {"model_type": "llama4", **quantised, "text_config": text},
            {"model_type": "llama4", "text_config": {**text, **quantised}},
        ]
    for config in configs:
        caplog.clear()
        spec_fields(config)
        (message,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert "quant_method='fp8'" in message and "must be dequantised to float16" in message
    caplog.clear()
    spec_fields(config_of("mixtral", **{name: None}))
    assert not caplog.records


DENSE = [
    *(
        (family, {"first_k_dense_replace": first, "num_hidden_layers": 4}, "first_k_dense_replace")
        for family in ("deepseek_v2", "deepseek_v3", "glm4_moe")
        for first in (4, 5)
    ),
    ("deepseek_v3", {"first_k_dense_replace": 3, "num_hidden_layers": 4, "moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"num_hidden_layers": 2, "moe_layer_freq": [0, 0]}, "moe_layer_freq"),
    *(
        (family, fields, name)
        for family in ("qwen2_moe", "qwen3_moe")
        for fields, name in (
            ({"decoder_sparse_step": 5, "num_hidden_layers": 4}, "decoder_sparse_step"),
            ({"mlp_only_layers": [0, 1, 2, 3], "num_hidden_layers": 4}, "mlp_only_layers"),
            ({"mlp_only_layers": [1, 3], "decoder_sparse_step": 2, "num_hidden_layers": 4}, "mlp_only_layers"),
        )
    ),
    ("llama4_text", {"moe_layers": []}, "moe_layers"),
    ("llama4_text", {"moe_layers": [4, 7], "num_hidden_layers": 4}, "moe_layers"),
    ("llama4_text", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
    ("llama4_text", {"interleave_moe_layer_step": 5, "num_hidden_layers": 4}, "interleave_moe_layer_step"),
    *((family, {"enable_moe_block": False}, "enable_moe_block") for family in CONFIGS),
    *((family, {"mlp_layer_types": ["dense", "dense"]}, "mlp_layer_types") for family in CONFIGS),
    *((family, {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config") for family in CONFIGS),
    *((family, {"block_configs": [{}]}, "block_configs") for family in CONFIGS),
]


@pytest.mark.parametrize(("model_type", "changes", "field"), DENSE)
def test_models_without_the_layer_asked_for(model_type: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{field}=.* is not supported. (No layer|Layers that differ)"):
        spec_of(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("deepseek_v2", {"first_k_dense_replace": 1, "num_hidden_layers": 27, "moe_layer_freq": 1}),
        ("deepseek_v3", {"first_k_dense_replace": 3, "num_hidden_layers": 61}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "num_hidden_layers": 2, "moe_layer_freq": [0, 1]}),
        ("glm4_moe", {"first_k_dense_replace": None, "num_hidden_layers": 1}),
        ("qwen2_moe", {"decoder_sparse_step": 4, "num_hidden_layers": 4, "mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 1, "num_hidden_layers": 48, "mlp_only_layers": []}),
        ("qwen3_moe", {"mlp_only_layers": None}),
        ("llama4_text", {"interleave_moe_layer_step": 2, "num_hidden_layers": 48, "moe_layers": None}),
        ("llama4_text", {"interleave_moe_layer_step": 0, "num_hidden_layers": 48, "moe_layers": [1, 3]}),
        ("mixtral", {"per_layer_config": None, "enable_moe_block": True, "mlp_layer_types": ["dense", "sparse"]}),
    ],
)
def test_models_with_some_layers_of_experts(model_type: str, changes: dict[str, Any]) -> None:
    assert spec_of(model_type, **changes) == spec_of(model_type)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"norm_topk_prob": False}),
        ("granitemoe", {"norm_topk_prob": False}),
        ("gpt_oss", {"norm_topk_prob": False}),
        ("llama4_text", {"norm_topk_prob": True}),
        ("qwen3_moe", {"scoring_func": "sigmoid"}),
        ("llama4_text", {"scoring_func": "softmax"}),
        ("qwen3_moe", {"swiglu_limit": 7.0}),
        ("deepseek_v3", {"swiglu_limit": 10}),
        ("mixtral", {"n_group": 4}),
        ("olmoe", {"routed_scaling_factor": 2.5}),
    ],
)
def test_functions_of_other_families(model_type: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="is not supported"):
        spec_of(model_type, **changes)


NUMBERS: list[tuple[str, str]] = [
    *((family, name) for family in CONFIGS for name, value in CONFIGS[family].items() if type(value) is int),
    *(("gpt_oss", name) for name in ("swiglu_alpha", "swiglu_limit")),
    *(("deepseek_v2", name) for name in ("routed_scaling_factor", "first_k_dense_replace", "num_hidden_layers")),
    *(("qwen3_moe", name) for name in ("decoder_sparse_step", "num_hidden_layers", "num_local_experts")),
    ("llama4_text", "interleave_moe_layer_step"),
]


@pytest.mark.parametrize(("model_type", "name"), NUMBERS)
def test_bad_numbers_name_their_field(model_type: str, name: str) -> None:
    if name == "intermediate_size" and "moe_intermediate_size" in CONFIGS[model_type]:
        return  # of the dense MLP
    negative = [] if name in ("routed_scaling_factor", "swiglu_alpha") else [-1]
    for value in (float("nan"), float("inf"), float("-inf"), *negative, True, "8", [8], {}, 10**400, -(10**400), 1j):
        with pytest.raises(SpecError, match=rf"^{name}=.* in the config is not valid\. Must "):
            spec_of(model_type, **{name: value})


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 1e-320])
def test_swiglu_alpha_divides(value: float) -> None:
    with pytest.raises(SpecError, match=r"^swiglu_alpha=.* in the config is not valid\. Must not be 0"):
        spec_of("gpt_oss", swiglu_alpha=value)


@pytest.mark.parametrize("value", [[-1], [True], ["0"], 3, "all", {"0": 1}])
@pytest.mark.parametrize(("model_type", "name"), [("qwen2_moe", "mlp_only_layers"), ("llama4_text", "moe_layers")])
def test_bad_lists_of_layers(model_type: str, name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^{name}=.* in the config is not valid\. Must be a list of integers"):
        spec_of(model_type, **{name: value})


def test_numbers_of_numpy() -> None:
    config = {name: np.int64(value) if type(value) is int else value for name, value in config_of("gpt_oss").items()}
    assert MoESpec.from_hf_config({**config, "swiglu_limit": np.float64(5)}, max_tokens=16) == spec_of(
        "gpt_oss", swiglu_limit=5
    )


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(SpecError, match=r"config='/dev/zero' is not valid. Must hold at most"):
        spec_fields("/dev/zero")
