"""From the options of a command to a spec, a tile and a schedule."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import env
from ..arch import ARCHS, get_arch
from ..errors import SpecError
from ..hf_config import spec_fields
from ..instrument import Instrument
from ..presets import PRESETS, preset_fields
from ..programs import default_tile
from ..spec import MoESpec
from ..tile import Schedule, TileConfig
from . import console

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help=f"A model by name: {', '.join(PRESETS)}.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A Hugging Face config.json, or its folder.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of MoESpec, TileConfig, Schedule or Instrument; may be repeated.",
        show_default=False,
    ),
]
Kernel = Literal["moe", "router"]
KernelOption = Annotated[str, typer.Option("--kernel", "-k", metavar="[moe|router]", help="Which kernel.")]

_SPEC_FIELDS = [field.name for field in dataclasses.fields(MoESpec)]
_TILE_FIELDS = list(TileConfig(1, 2).text_fields())
_SCHEDULE_FIELDS = [field.name for field in dataclasses.fields(Schedule)]
_INSTRUMENT_FIELDS = [field.name for field in dataclasses.fields(Instrument)]
_FIELDS = _SPEC_FIELDS + _TILE_FIELDS + _SCHEDULE_FIELDS + _INSTRUMENT_FIELDS
_OLD_FIELDS = {"group": "panel"}
_OLD_ARCHS = ("sm_70", "sm_75")
_WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the options ask for.

    Attributes:
        spec: the layer.
        tile: the fields of the tile that were set; the rest is the architecture's default.
        schedule: order of the tasks, and how rows come back.
        instrument: tracing and delays.
        chosen: names of all fields that were set.
    """

    spec: MoESpec
    tile: dict[str, Any]
    schedule: Schedule
    instrument: Instrument
    chosen: tuple[str, ...] = ()

    def tile_for(self, arch: str) -> TileConfig:
        """The tile for one architecture."""
        return default_tile(self.spec, arch, self.tile.get("program")).replace(**self.tile)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A field that a command has an option of its own for.

    Attributes:
        option: its name, with dashes.
        value: what it is, given or by default; ``None``: nothing, ``--set`` may say it.
    """

    option: str
    value: Any


def settings(texts: list[str] | None) -> dict[str, Any]:
    """Parse ``--set`` options into fields of the spec, the tile, the schedule and the instrument.

    Raises:
        SpecError: not ``field=value``, no field of that name, or two values for one.
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, word = text.partition("=")
        if not equals:
            raise SpecError(f"--set {text} is not valid. Must be field=value.")
        if name in _OLD_FIELDS:
            console.note(f"--set {text}: {name} is deprecated, its name is {_OLD_FIELDS[name]} now")
            name = _OLD_FIELDS[name]
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Fields: {', '.join(_FIELDS)}."
            raise SpecError(f"--set {text} is not valid: there is no field {name!r}.{hint}")
        value = _value(word)
        if name in found and not _same(found[name], value):
            raise SpecError(f"--set {name}={found[name]} and --set {text} are not valid together.")
        found[name] = value
    return found


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal, or an absurd one
        return text


def request(
    model: str | None,
    config: Path | None,
    texts: list[str] | None,
    *,
    kernel: str | None = None,
    fixed: dict[str, Fixed] | None = None,
) -> Request:
    """Put a model, its config or nothing together with ``--set`` fields and with the command's own options.

    Fields that the kernel's text does not depend on may be absent.

    Raises:
        SpecError: a field is missing, not valid, said twice in different ways, or of no use to the ``kernel``.
        UnsupportedError: the config describes a layer that a spec cannot express.
    """
    if model is not None and config is not None:
        raise SpecError("--model and --config are not valid together.")
    chosen = settings(texts)
    given = {name: own for name, own in (fixed or {}).items() if own.value is not None}
    for name, own in given.items():
        if name in chosen and not _same(chosen[name], own.value):
            raise SpecError(f"--set {name}={chosen[name]} and {own.option} {own.value} are not valid together. Use {own.option}.")
    values = {**chosen, **{name: own.value for name, own in given.items()}}
    own_fields, tile, schedule, instrument = (
        {name: value for name, value in values.items() if name in names}
        for names in (_SPEC_FIELDS, _TILE_FIELDS, _SCHEDULE_FIELDS, _INSTRUMENT_FIELDS)
    )
    if kernel == "router" and (useless := [*tile, *schedule, *instrument]):
        raise SpecError(f"--set {useless[0]} is not valid with --kernel router, which has no tiles, schedules or instruments.")
    base = preset_fields(model) if model is not None else spec_fields(config) if config is not None else {}
    fields = {**base, **own_fields}
    needed = ["hidden_size", "top_k"] if kernel == "router" else ["hidden_size", "intermediate_size", "top_k"]
    if missing := [name for name in needed if name not in fields]:
        sets = " ".join(f"--set {name}=..." for name in missing)
        raise SpecError(f"{', '.join(missing)} missing. Pass --model, --config or {sets}.")
    # What the text does not depend on, see render.generate.
    fields.setdefault("intermediate_size", fields["hidden_size"])
    fields.setdefault("num_experts", fields["top_k"])
    fields.setdefault("max_tokens", 1)
    return Request(MoESpec(**fields), tile, Schedule(**schedule), Instrument(**instrument), tuple(chosen))


def layer_fields(tokens: int, ranks: int, experts: int | None) -> dict[str, Fixed]:
    """The fields that ``--tokens``, ``--ranks`` and ``--experts`` stand for."""
    return {
        "max_tokens": Fixed("--tokens", tokens),
        "world_size": Fixed("--ranks", ranks),
        "num_experts": Fixed("--experts", experts),
    }


def checked_target(target: str | None, default: str) -> str:
    """Where to run: the option, else ``FLASHMOE_TARGET``, else the default.

    Raises:
        SpecError: neither ``host`` nor ``cuda``.
    """
    chosen = target or env.target() or default
    if chosen not in ("host", "cuda"):
        raise SpecError(f"--target {chosen} is not valid. Must be host or cuda.")
    return chosen


def checked_archs(names: list[str]) -> list[str]:
    """Architectures by name, each once; ``all`` stands for every one.

    Raises:
        SpecError: there is none of that name.
        UnsupportedError: there is, and no kernels for it.
    """
    for name in names:
        if name != "all" and name not in ARCHS:
            if name in _OLD_ARCHS:
                get_arch(name)
            close = difflib.get_close_matches(name, ARCHS, n=1, cutoff=0.82)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise SpecError(f"--arch {name} is not valid. Must be one of {', '.join(ARCHS)}.{hint}")
    return list(ARCHS) if "all" in names else list(dict.fromkeys(names))


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
