"""From a Hugging Face ``config.json`` to the fields of :class:`~flashmoe_gen.spec.MoESpec`.

One function per model family, keyed by ``model_type`` in ``_FAMILIES``. Each expresses what the ``transformers``
implementation of that family computes at inference; ``tests/golden`` holds outputs of those implementations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from .dtypes import DTYPES
from .errors import SpecError
from .hf_file import Config, ConfigLike, load
from .hf_layers import require_moe_layers

logger = logging.getLogger("flashmoe_gen")

Fields = dict[str, Any]

# quick_gelu is x * sigmoid(1.702 x), a scaled silu. gelu_new and the *_tanh names are one formula.
_ACTIVATIONS: dict[str, Fields] = {
    "silu": {"activation": "silu"},
    "swish": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_python": {"activation": "gelu"},
    "gelu_new": {"activation": "gelu_tanh"},
    "gelu_pytorch_tanh": {"activation": "gelu_tanh"},
    "gelu_python_tanh": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "silu", "swish_alpha": 1 / 1.702, "swish_beta": 1.702},
    "relu": {"activation": "relu"},
    "linear": {"activation": "identity"},
}


# Names of one thing. transformers writes either of some, reads one, and takes no notice of the others.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_selected_experts", "moe_topk")
_WIDTH = ("intermediate_size", "moe_intermediate_size")  # where the experts are the only MLPs
_DTYPE = ("dtype", "torch_dtype")


def _shape(config: Config, *width: str) -> Fields:
    width = width or ("moe_intermediate_size",)
    config.get(int, width[0])  # what the model reads must be there
    return {
        "hidden_size": config.get(int, "hidden_size"),
        "intermediate_size": config.get(int, *width),
        "num_experts": config.get(int, *_EXPERTS),
        "top_k": config.get(int, *_TOP_K),
    }


def _activation(config: Config) -> Fields:
    name = config.get(str, "hidden_act", "hidden_activation", default="silu")
    if name not in _ACTIVATIONS:
        raise config.unsupported("hidden_act", f"Must be one of {', '.join(map(repr, _ACTIVATIONS))}.")
    return _ACTIVATIONS[name]


def _dtype(config: Config) -> str:
    """What ``dtype`` says, or else its older name: transformers writes one, and so reads both."""
    found = {field: config.get(str, field) for field in _DTYPE if config.values.get(field) is not None}
    if not found:
        return "bfloat16"
    field = next(iter(found))
    names = [name.removeprefix("torch.") for name in found.values()]
    if names[0] not in DTYPES:
        raise config.unsupported(field, f"Must be one of {', '.join(map(repr, DTYPES))}.")
    if names[0] != names[-1]:
        logger.warning(
            "dtype=%r in %s counts, as in transformers, and torch_dtype=%r does not.", names[0], config.source, names[1]
        )
    return names[0]


def _qwen_moe(config: Config) -> Fields:
    renormalize = config.get(bool, "norm_topk_prob", default=False)
    return {**_shape(config), **_activation(config), "renormalize": renormalize}


def _olmoe(config: Config) -> Fields:
    renormalize = config.get(bool, "norm_topk_prob", default=False)
    return {**_shape(config, *_WIDTH), **_activation(config), "renormalize": renormalize}


def _mixtral(config: Config) -> Fields:
    # router_jitter_noise acts in training only
    config.require_flag("norm_topk_prob", True)
    return {**_shape(config, *_WIDTH), **_activation(config), "renormalize": True}


def _granite(config: Config) -> Fields:
    # softmax over the chosen logits == softmax over all, chosen, divided by their sum
    config.require_flag("norm_topk_prob", True)
    return {**_shape(config, *_WIDTH), **_activation(config), "renormalize": True}


def _deepseek_v2(config: Config) -> Fields:
    config.require("topk_method", "greedy", "group_limited_greedy")
    if config.get(bool, "norm_topk_prob", default=False):
        logger.warning(
            "norm_topk_prob=True in %s: transformers' DeepSeek-V2 does not renormalize, and neither does this spec; "
            "pass renormalize=True to change that.",
            config.source,
        )
    fields = {
        **_shape(config),
        **_activation(config),
        "renormalize": False,
        "routed_scale": config.get(float, "routed_scaling_factor", default=1.0),
    }
    if config.values.get("topk_method") == "group_limited_greedy":
        fields["num_groups"] = config.get(int, "n_group")
        fields["top_groups"] = config.get(int, "topk_group")
        fields["group_score"] = "max"
    return fields


def _deepseek_v3(config: Config) -> Fields:
    config.require("topk_method", "noaux_tc")
    # No defaults: they differ between families, and a wrong guess routes wrongly without a trace.
    return {
        **_shape(config),
        **_activation(config),
        "scoring": "sigmoid",
        "renormalize": config.get(bool, "norm_topk_prob"),
        "num_groups": config.get(int, "n_group"),
        "top_groups": config.get(int, "topk_group"),
        "group_score": "top2_sum",
        "routed_scale": config.get(float, "routed_scaling_factor"),
    }


def _llama4(config: Config) -> Fields:
    config.require_flag("norm_topk_prob", False)
    return {
        **_shape(config, *_WIDTH),
        **_activation(config),
        "scoring": "sigmoid",
        "renormalize": False,
        "weight_on": "input",
    }


def _gpt_oss(config: Config) -> Fields:
    config.require_flag("norm_topk_prob", True)
    # gate * sigmoid(alpha * gate) == silu(alpha * gate) / alpha; the model does not read hidden_act
    alpha = config.get(float, "swiglu_alpha", default=1.702)
    if alpha == 0.0 or math.isinf(1 / alpha):
        raise SpecError(f"swiglu_alpha={alpha!r} in {config.source} is not valid. Must not be 0.")
    return {
        **_shape(config, *_WIDTH),
        "activation": "silu",
        "swish_alpha": 1 / alpha,
        "swish_beta": alpha,
        "gate_limit": config.get(float, "swiglu_limit", default=7.0, positive=True),
        "up_offset": 1.0,
        "bias": True,
        "renormalize": True,
    }


def _phimoe(config: Config) -> Fields:
    raise config.unsupported(
        "router_jitter_noise",
        "model_type='phimoe' routes by sparsemixer: at inference too, each expert's weight is a softmax over only the "
        "logits within a relative distance of 2 * router_jitter_noise of the largest one that is left.",
    )


_FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
}


_SIGMOID = ("deepseek_v3", "glm4_moe", "llama4", "llama4_text")
_GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe")


def _refuse_foreign(config: Config, family: str) -> None:
    """Fields of other families that change what a layer computes: transformers takes no notice of them here."""
    config.require("scoring_func", "sigmoid" if family in _SIGMOID else "softmax")
    why = f"The layers of a {family!r} model do not read it."
    if family != "gpt_oss":
        for name in ("swiglu_alpha", "swiglu_limit"):
            if config.values.get(name) is not None:
                raise config.unsupported(name, why)
    if family not in _GROUPED:
        for name in ("n_group", "routed_scaling_factor"):
            if config.get(float, name, default=1.0) != 1.0:
                raise config.unsupported(name, why)


def _warn_of_quantization(config: Config, dtype: str) -> None:
    for name in ("quantization_config", "compression_config"):
        found = config.values.get(name)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            logger.warning(
                "%s in %s (quant_method=%r): the spec is of %s layers, so the weights must be dequantised to %s before they are "
                "given to Experts.",
                name,
                config.source,
                method,
                dtype,
                dtype,
            )


def _shared_deepseek(config: Config) -> tuple[int, int]:
    # an explicit null means none; absence means the family's default, at least one
    count = config.get(int, "n_shared_experts", default=0 if "n_shared_experts" in config.values else 1, low=0)
    return count, count * config.get(int, "moe_intermediate_size")


def _shared_llama4(config: Config) -> tuple[int, int]:
    return 1, config.get(int, "intermediate_size")


def _shared_qwen2(config: Config) -> tuple[int, int]:
    width = config.get(int, "shared_expert_intermediate_size", low=0)
    return int(width > 0), width


# (number of shared experts, their total intermediate size); families not listed have none
_SHARED: dict[str, Callable[[Config], tuple[int, int]]] = {
    "deepseek_v2": _shared_deepseek,
    "deepseek_v3": _shared_deepseek,
    "glm4_moe": _shared_deepseek,
    "llama4": _shared_llama4,
    "llama4_text": _shared_llama4,
    "qwen2_moe": _shared_qwen2,
}


def _family(config: Config) -> str:
    model_type = config.get(str, "model_type")
    if model_type not in _FAMILIES:
        supported = ", ".join(repr(name) for name in _FAMILIES if name != "phimoe")
        raise config.unsupported("model_type", f"Must be one of {supported}.")
    return model_type


def _shared(config: Config) -> tuple[int, int]:
    size = _SHARED.get(_family(config))
    return size(config) if size else (0, 0)


def shared_experts(config: ConfigLike) -> int:
    """How many shared experts the model adds beside the routed ones; the spec does not contain them.

    Args:
        config: path of ``config.json`` or of the folder holding it, or the parsed dict.

    Returns:
        The number of shared experts; 0 for a family without any.

    Raises:
        UnsupportedError: the ``model_type`` is not known; the message lists those that are.
        SpecError: the file cannot be read, is not JSON, or lacks a field; names field and file.
    """
    return _shared(load(config))[0]


def spec_fields(config: ConfigLike) -> Fields:
    """The :class:`~flashmoe_gen.spec.MoESpec` fields of a model, without ``max_tokens`` and ``world_size``.

    Biases of the router are arguments of a call, not fields: gpt-oss passes its router's bias as ``logit_bias``,
    DeepSeek-V3 and GLM-4 MoE pass ``e_score_correction_bias`` as ``selection_bias``. Shared experts are not part of
    a spec either; their number is logged as a warning (see :func:`shared_experts`). So is a ``quantization_config``: the
    spec is of layers in the config's dtype, and their weights must be dequantised.

    Args:
        config: path of ``config.json`` or of the folder holding it, or the parsed dict.

    Returns:
        Keyword arguments for :class:`~flashmoe_gen.spec.MoESpec`.

    Raises:
        UnsupportedError: the model computes something the spec cannot express; names the field and its value.
        SpecError: the file cannot be read, is not JSON, a field is missing or of a wrong type, or two fields contradict
            each other; names field and file.
    """
    loaded = load(config)
    family = _family(loaded)
    _refuse_foreign(loaded, family)
    require_moe_layers(loaded, family)
    fields = {"dtype": _dtype(loaded), **_FAMILIES[family](loaded)}
    _warn_of_quantization(loaded, fields["dtype"])
    count, width = _shared(loaded)
    if count:
        logger.warning(
            "%s has %d shared expert(s) of total intermediate size %d per MoE layer; they are not part of the spec: "
            "compute them as a dense MLP and add the result.",
            loaded.source,
            count,
            width,
        )
    return fields
