"""Which layers of a model have experts: a config may leave none, or make each of them different."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .hf_file import Config

# Fields that give layers shapes or functions of their own; what else the config says holds for none of them then.
_PER_LAYER = ("per_layer_config", "block_configs")
_SWITCHES = ("enable_moe_block", "use_moe")  # false: there are no experts

Layers = Callable[[Config, int], tuple[str, Iterable[int]]]


def _deepseek(config: Config, count: int) -> tuple[str, Iterable[int]]:
    first = config.get(int, "first_k_dense_replace", default=0, low=0)
    layers = range(first, count)
    every = config.values.get("moe_layer_freq")
    if isinstance(every, (list, tuple)):
        chosen = config.integers("moe_layer_freq") or []
        return "moe_layer_freq", [layer for layer in layers if layer < len(chosen) and chosen[layer]]
    step = config.get(int, "moe_layer_freq", default=1)
    return ("moe_layer_freq" if layers else "first_k_dense_replace"), [layer for layer in layers if layer % step == 0]


def _qwen(config: Config, count: int) -> tuple[str, Iterable[int]]:
    step = config.get(int, "decoder_sparse_step", default=1)
    dense = config.integers("mlp_only_layers") or []
    sparse = range(step - 1, count, step)
    return ("mlp_only_layers" if sparse else "decoder_sparse_step"), [layer for layer in sparse if layer not in dense]


def _llama4(config: Config, count: int) -> tuple[str, Iterable[int]]:
    chosen = config.integers("moe_layers")
    if chosen is not None:
        return "moe_layers", [layer for layer in chosen if layer < count]
    step = config.get(int, "interleave_moe_layer_step", default=1, low=0)
    return "interleave_moe_layer_step", range(step - 1, count, step) if step else ()


_LAYERS: dict[str, Layers] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _deepseek,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
}


def require_moe_layers(config: Config, family: str) -> None:
    """Refuse a model without a layer of experts, and one whose layers differ.

    Raises:
        UnsupportedError: names the field that says so.
        SpecError: such a field is of a wrong type.
    """
    for name in _PER_LAYER:
        if config.values.get(name):
            raise config.unsupported(name, "Layers that differ from each other cannot be told by one spec.")
    for name in _SWITCHES:
        if not config.get(bool, name, default=True):
            raise config.unsupported(name, "No layer of this model has experts.")
    kinds = config.values.get("mlp_layer_types")
    if isinstance(kinds, (list, tuple)) and not {"sparse", "moe"}.intersection(map(str, kinds)):
        raise config.unsupported("mlp_layer_types", "No layer of this model has experts.")
    if family not in _LAYERS:
        return
    unknown = 1 << 20  # layers, where the config does not say how many there are
    count = config.get(int, "num_hidden_layers", default=unknown)
    field, layers = _LAYERS[family](config, count)
    if not any(True for _ in layers):
        of = "" if count == unknown else f" of num_hidden_layers={count}"
        raise config.unsupported(field, f"No layer{of} has experts.")
