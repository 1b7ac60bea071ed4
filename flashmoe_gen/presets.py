"""The MoE layers of well-known models by name.

A preset holds the routed experts only: the shared experts of ``SHARED_EXPERTS`` are a dense MLP beside them. Router
biases (gpt-oss: ``logit_bias``; DeepSeek-V3 and GLM-4.5: ``selection_bias``) are arguments of a routing call.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any

from .errors import SpecError

logger = logging.getLogger("flashmoe_gen")


def _preset(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, **routing: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
        **routing,
    }


_PLAIN = {"renormalize": False}
_RENORMALIZED = {"renormalize": True}
_LLAMA4 = {"scoring": "sigmoid", "renormalize": False, "weight_on": "input"}
_SIGMOID_BIASED = {"scoring": "sigmoid", "renormalize": True, "group_score": "top2_sum"}
_GPT_OSS = {
    "bias": True,
    "swish_alpha": 1 / 1.702,
    "swish_beta": 1.702,
    "gate_limit": 7.0,
    "up_offset": 1.0,
    "renormalize": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2": _preset(
        5120, 1536, 160, 6, **_PLAIN, num_groups=8, top_groups=3, group_score="max", routed_scale=16.0
    ),
    "deepseek-v2-lite": _preset(2048, 1408, 64, 6, **_PLAIN),
    "deepseek-v3": _preset(7168, 2048, 256, 8, **_SIGMOID_BIASED, num_groups=8, top_groups=4, routed_scale=2.5),
    "glm-4.5-air": _preset(4096, 1408, 128, 8, **_SIGMOID_BIASED),
    "gpt-oss-120b": _preset(2880, 2880, 128, 4, **_GPT_OSS),
    "gpt-oss-20b": _preset(2880, 2880, 32, 4, **_GPT_OSS),
    "granite-3.1-3b-a800m": _preset(1536, 512, 40, 8, **_RENORMALIZED),
    "llama4-maverick": _preset(5120, 8192, 128, 1, **_LLAMA4),
    "llama4-scout": _preset(5120, 8192, 16, 1, **_LLAMA4),
    "mixtral-8x22b": _preset(6144, 16384, 8, 2, **_RENORMALIZED),
    "mixtral-8x7b": _preset(4096, 14336, 8, 2, **_RENORMALIZED),
    "olmoe-1b-7b": _preset(2048, 1024, 64, 8, **_PLAIN),
    "qwen2-57b-a14b": _preset(3584, 2560, 64, 8, **_PLAIN),
    "qwen3-235b-a22b": _preset(4096, 1536, 128, 8, **_RENORMALIZED),
    "qwen3-30b-a3b": _preset(2048, 768, 128, 8, **_RENORMALIZED),
}

SHARED_EXPERTS: dict[str, int] = {
    "deepseek-v2": 2,
    "deepseek-v2-lite": 2,
    "deepseek-v3": 1,
    "glm-4.5-air": 1,
    "llama4-maverick": 1,
    "llama4-scout": 1,
    "qwen2-57b-a14b": 1,
}


def preset_fields(name: str) -> dict[str, Any]:
    """The :class:`~flashmoe_gen.spec.MoESpec` fields of a model, without ``max_tokens`` and ``world_size``.

    The shared experts that the model has beside the routed ones are logged as a warning.

    Args:
        name: a key of :data:`PRESETS`.

    Returns:
        A new dict of keyword arguments.

    Raises:
        SpecError: no preset of that name; the message lists them and names the closest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name).lower(), PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SpecError(f"preset {name!r} is not known.{hint} Must be one of {', '.join(map(repr, PRESETS))}.")
    if name in SHARED_EXPERTS:
        logger.warning(
            "%s has %d shared expert(s) per MoE layer; they are not part of the spec: "
            "compute them as a dense MLP and add the result.",
            name,
            SHARED_EXPERTS[name],
        )
    return dict(PRESETS[name])
