"""From the options of a command to a spec and a tile."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import SpecError
from ..hf_config import spec_fields
from ..instrument import Instrument
from ..plan import TileConfig, default_tile
from ..presets import PRESETS, preset_fields
from ..spec import MoESpec

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help=f"A model by name: {', '.join(PRESETS)}.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A Hugging Face config.json, or its folder.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="A field of MoESpec, TileConfig or Instrument; may be repeated.", show_default=False
    ),
]
Kernel = Literal["moe", "router"]
KernelOption = Annotated[str, typer.Option("--kernel", "-k", metavar="[moe|router]", help="Which kernel.")]

_SPEC_FIELDS = [field.name for field in dataclasses.fields(MoESpec)]
_TILE_FIELDS = [field.name for field in dataclasses.fields(TileConfig)]
_INSTRUMENT_FIELDS = [field.name for field in dataclasses.fields(Instrument)]
_FIELDS = _SPEC_FIELDS + _TILE_FIELDS + _INSTRUMENT_FIELDS
_WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the options ask for.

    Attributes:
        spec: the layer.
        tile: the fields of the tile that were set; the rest is the architecture's default.
        instrument: tracing and delays.
    """

    spec: MoESpec
    tile: dict[str, Any]
    instrument: Instrument

    def tile_for(self, arch: str) -> TileConfig:
        """The tile for one architecture."""
        return default_tile(self.spec, arch).replace(**self.tile)


def settings(texts: list[str] | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parse ``--set`` options into fields of the spec, of the tile and of the instrument.

    Raises:
        SpecError: not ``field=value``, or no field of that name.
    """
    spec: dict[str, Any] = {}
    tile: dict[str, Any] = {}
    instrument: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--set {text} is not valid. Must be field=value.")
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Fields: {', '.join(_FIELDS)}."
            raise SpecError(f"--set {text} is not valid: there is no field {name!r}.{hint}")
        (spec if name in _SPEC_FIELDS else tile if name in _TILE_FIELDS else instrument)[name] = _value(value)
    return spec, tile, instrument


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def request(
    model: str | None, config: Path | None, texts: list[str] | None, *, kernel: str = "moe", **fixed: Any
) -> Request:
    """Put a model, its config or nothing together with ``--set`` fields; ``fixed`` fields win over all.

    Fields that the kernel's text does not depend on may be absent.

    Raises:
        SpecError: a field is missing or not valid, or both ``--model`` and ``--config`` are given.
        UnsupportedError: the config describes a layer that a spec cannot express.
    """
    if model is not None and config is not None:
        raise SpecError("--model and --config are not valid together.")
    chosen, tile, instrument = settings(texts)
    base = preset_fields(model) if model is not None else spec_fields(config) if config is not None else {}
    fields = {**base, **chosen, **fixed}
    needed = ["hidden_size", "top_k"] if kernel == "router" else ["hidden_size", "intermediate_size", "top_k"]
    if missing := [name for name in needed if name not in fields]:
        sets = " ".join(f"--set {name}=..." for name in missing)
        raise SpecError(f"{', '.join(missing)} missing. Pass --model, --config or {sets}.")
    # What the text does not depend on, see render.generate.
    fields.setdefault("intermediate_size", fields["hidden_size"])
    fields.setdefault("num_experts", fields["top_k"])
    fields.setdefault("max_tokens", 1)
    return Request(MoESpec(**fields), tile, Instrument(**instrument))


def checked_kernel(kernel: str) -> Kernel:
    """The kernel's name, if there is one of that name.

    Raises:
        SpecError: there is none.
    """
    if kernel == "moe":
        return "moe"
    if kernel == "router":
        return "router"
    raise SpecError(f"--kernel {kernel} is not valid. Must be moe or router.")
