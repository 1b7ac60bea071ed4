"""From a Hugging Face ``config.json`` to the fields of :class:`~flashmoe_gen.spec.MoESpec`.

One function per model family, keyed by ``model_type`` in ``_FAMILIES``. Each expresses what the ``transformers``
implementation of that family computes at inference; ``tests/golden`` holds outputs of those implementations.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .dtypes import DTYPES
from .errors import SpecError, UnsupportedError

logger = logging.getLogger("flashmoe_gen")

ConfigLike = str | os.PathLike[str] | Mapping[str, Any]
Fields = dict[str, Any]
_T = TypeVar("_T")

_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
}

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


class _Config:
    """The parsed JSON and where it came from, so that every error names field and file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, kind: type[_T], *names: str, default: _T | None = None) -> _T:
        """The first of ``names`` that is present and not null; without a default, absence is an error."""
        for name in names:
            value: Any = self.values.get(name)
            if value is None:
                continue
            accepted, words = _KINDS[kind]
            if type(value) not in accepted:  # not isinstance, to which True is an int
                raise SpecError(f"{name}={value!r} in {self.source} is not valid. Must be {words}.")
            if kind is float:
                value = float(value)
            result: _T = value
            return result
        if default is None:
            raise SpecError(f"{names[0]} is missing from {self.source}.")
        return default

    def unsupported(self, name: str, why: str) -> UnsupportedError:
        return UnsupportedError(f"{name}={self.values.get(name)!r} in {self.source} is not supported. {why}")

    def require(self, name: str, *supported: str) -> None:
        """Refuse a value that selects another function; an absent field means the first."""
        if self.get(str, name, default=supported[0]) not in supported:
            raise self.unsupported(name, f"Must be {' or '.join(map(repr, supported))}.")


def _load(config: ConfigLike) -> _Config:
    if isinstance(config, Mapping):
        values, source = config, "the config"
    elif isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        source = str(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(
                f"config={source!r} cannot be read: {error.strerror or error}. "
                "Must be a local config.json or the folder that holds it."
            ) from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise SpecError(f"config={source!r} is not valid JSON: {error}") from error
    else:
        raise SpecError(f"config={config!r} is not valid. Must be a path or a dict.")
    if not isinstance(values, Mapping):
        raise SpecError(f"config={source!r} is not valid. Must hold a JSON object.")
    text = values.get("text_config")
    if values.get("model_type") == "llama4" and isinstance(text, Mapping):
        outer = {name: values[name] for name in ("torch_dtype", "dtype") if name in values}
        inner = {name: value for name, value in text.items() if value is not None}
        return _Config({"model_type": "llama4_text", **outer, **inner}, f"text_config of {source}")
    return _Config(values, source)


def _shape(config: _Config, width: str = "moe_intermediate_size") -> Fields:
    return {
        "hidden_size": config.get(int, "hidden_size"),
        "intermediate_size": config.get(int, width),
        # transformers maps these names onto each other, and writes either
        "num_experts": config.get(int, "num_experts", "num_local_experts", "n_routed_experts"),
        "top_k": config.get(int, "num_experts_per_tok"),
    }


def _activation(config: _Config) -> Fields:
    name = config.get(str, "hidden_act", default="silu")
    if name not in _ACTIVATIONS:
        raise config.unsupported("hidden_act", f"Must be one of {', '.join(map(repr, _ACTIVATIONS))}.")
    return _ACTIVATIONS[name]


def _dtype(config: _Config) -> str:
    name = config.get(str, "dtype", "torch_dtype", default="bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        field = "dtype" if config.values.get("dtype") is not None else "torch_dtype"
        raise config.unsupported(field, f"Must be one of {', '.join(map(repr, DTYPES))}.")
    return name


def _qwen_moe(config: _Config) -> Fields:
    renormalize = config.get(bool, "norm_topk_prob", default=False)
    return {**_shape(config), **_activation(config), "renormalize": renormalize}


def _olmoe(config: _Config) -> Fields:
    renormalize = config.get(bool, "norm_topk_prob", default=False)
    return {**_shape(config, "intermediate_size"), **_activation(config), "renormalize": renormalize}


def _mixtral(config: _Config) -> Fields:
    # router_jitter_noise acts in training only
    return {**_shape(config, "intermediate_size"), **_activation(config), "renormalize": True}


def _granite(config: _Config) -> Fields:
    # softmax over the chosen logits == softmax over all, chosen, divided by their sum
    return {**_shape(config, "intermediate_size"), **_activation(config), "renormalize": True}


def _deepseek_v2(config: _Config) -> Fields:
    config.require("scoring_func", "softmax")
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


def _deepseek_v3(config: _Config) -> Fields:
    config.require("scoring_func", "sigmoid")
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


def _llama4(config: _Config) -> Fields:
    return {
        **_shape(config, "intermediate_size"),
        **_activation(config),
        "scoring": "sigmoid",
        "renormalize": False,
        "weight_on": "input",
    }


def _gpt_oss(config: _Config) -> Fields:
    # gate * sigmoid(alpha * gate) == silu(alpha * gate) / alpha; the model does not read hidden_act
    alpha = config.get(float, "swiglu_alpha", default=1.702)
    return {
        **_shape(config, "intermediate_size"),
        "activation": "silu",
        "swish_alpha": 1 / alpha,
        "swish_beta": alpha,
        "gate_limit": config.get(float, "swiglu_limit", default=7.0),
        "up_offset": 1.0,
        "bias": True,
        "renormalize": True,
    }


def _phimoe(config: _Config) -> Fields:
    raise config.unsupported(
        "router_jitter_noise",
        "model_type='phimoe' routes by sparsemixer: at inference too, each expert's weight is a softmax over only the "
        "logits within a relative distance of 2 * router_jitter_noise of the largest one that is left.",
    )


_FAMILIES: dict[str, Callable[[_Config], Fields]] = {
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


def _shared_deepseek(config: _Config) -> tuple[int, int]:
    # an explicit null means none; absence means the family's default, at least one
    count = config.get(int, "n_shared_experts", default=0 if "n_shared_experts" in config.values else 1)
    return count, count * config.get(int, "moe_intermediate_size")


def _shared_llama4(config: _Config) -> tuple[int, int]:
    return 1, config.get(int, "intermediate_size")


def _shared_qwen2(config: _Config) -> tuple[int, int]:
    width = config.get(int, "shared_expert_intermediate_size")
    return int(width > 0), width


# (number of shared experts, their total intermediate size); families not listed have none
_SHARED: dict[str, Callable[[_Config], tuple[int, int]]] = {
    "deepseek_v2": _shared_deepseek,
    "deepseek_v3": _shared_deepseek,
    "glm4_moe": _shared_deepseek,
    "llama4": _shared_llama4,
    "llama4_text": _shared_llama4,
    "qwen2_moe": _shared_qwen2,
}


def _family(config: _Config) -> str:
    model_type = config.get(str, "model_type")
    if model_type not in _FAMILIES:
        supported = ", ".join(repr(name) for name in _FAMILIES if name != "phimoe")
        raise config.unsupported("model_type", f"Must be one of {supported}.")
    return model_type


def _shared(config: _Config) -> tuple[int, int]:
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
    return _shared(_load(config))[0]


def spec_fields(config: ConfigLike) -> Fields:
    """The :class:`~flashmoe_gen.spec.MoESpec` fields of a model, without ``max_tokens`` and ``world_size``.

    Biases of the router are arguments of a call, not fields: gpt-oss passes its router's bias as ``logit_bias``,
    DeepSeek-V3 and GLM-4 MoE pass ``e_score_correction_bias`` as ``selection_bias``. Shared experts are not part of
    a spec either; their number is logged as a warning (see :func:`shared_experts`).

    Args:
        config: path of ``config.json`` or of the folder holding it, or the parsed dict.

    Returns:
        Keyword arguments for :class:`~flashmoe_gen.spec.MoESpec`.

    Raises:
        UnsupportedError: the model computes something the spec cannot express; names the field and its value.
        SpecError: the file cannot be read, is not JSON, or a field is missing or of a wrong type; names field and file.
    """
    loaded = _load(config)
    fields = {"dtype": _dtype(loaded), **_FAMILIES[_family(loaded)](loaded)}
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
