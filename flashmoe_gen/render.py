"""From a spec to the text of a kernel: Jinja2 chooses parts, types and numbers; everything else is C++."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from . import env, files, library
from .arch import Arch, get_arch
from .args import MOE_STRUCTS, ROUTER_STRUCTS
from .errors import CacheError, FlashMoEError, SpecError
from .instrument import Instrument
from .plan import KernelPlan
from .programs import RouterPlan, default_tile, resolve, router_program
from .spec import MoESpec
from .structs import Struct
from .tile import TileConfig

if TYPE_CHECKING:
    from .cache import CompiledKernel

KernelKind = Literal["moe", "router"]
_ACRONYM = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
# What a kernel's text depends on; everything else in a MoESpec is a launch argument.
_MOE_FIELDS = (
    "hidden_size intermediate_size top_k dtype mlp activation bias swish_alpha swish_beta gate_limit up_offset weight_on"
).split()
_ROUTER_FIELDS = "hidden_size top_k dtype scoring renormalize group_score routed_scale".split()


@dataclass(frozen=True)
class KernelSource:
    """The text of one kernel.

    Attributes:
        text: the whole translation unit.
        name: the C symbol of the kernel.
        arch: what it is for, ``"host"`` or ``"sm_XX"``.
        digest: SHA-256 of the text, hexadecimal.
        kind: ``"moe"`` or ``"router"``.
        metadata: spec, tile and the command that reproduces the text; kept with the compiled kernel.
    """

    text: str
    name: str
    arch: str
    digest: str
    kind: KernelKind
    metadata: dict[str, Any] = field(compare=False, repr=False)

    @property
    def suffix(self) -> str:
        return get_arch(self.arch).source_suffix

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the text; return the file's path. Folders are made if missing.

        Args:
            path: a file; or a folder, which gets ``<name>.cu`` / ``.cpp``: one that exists, or a path without suffix
                where there is nothing yet.

        Raises:
            FlashMoEError: it cannot be written (read-only, full); what was there before is still there.
        """
        target = Path(path)
        is_new = not os.path.lexists(target) and (not target.suffix or os.fspath(path).endswith(os.sep))
        if os.path.isdir(target) or is_new:
            target = target / f"{self.name}{self.suffix}"
        files.write_text(target, self.text)
        return target

    def compile(self) -> CompiledKernel:
        """Compile, or take the result from the cache. Needs no GPU.

        Raises:
            CompileError: no compiler on this machine, or it refused the text.
            CacheError: the cache directory cannot be used, or a miss while ``FLASHMOE_NO_JIT=1``.
        """
        from .cache import Cache

        if folder := env.keep_source():
            try:
                files.write_text(folder / f"{self.name}{self.suffix}", self.text)
            except FlashMoEError as error:
                raise CacheError(f"FLASHMOE_KEEP_SOURCE={folder} cannot be written: {error}") from error
        return Cache().build(self.text, name=self.name, arch=self.arch, digest=self.digest, metadata=self.metadata)


def template_dir() -> Path:
    """The folder of the templates: inside the wheel, or beside the package in a source checkout."""
    installed = Path(str(resources.files(__package__))) / "templates"
    return installed if installed.is_dir() else installed.parent.parent / "templates"


def _cpp(value: object) -> str:
    """A C++ literal of a bool, a float or None (as 0.0)."""
    if value is None:
        return "0.0"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@functools.lru_cache
def environment(templates: Path | None = None) -> jinja2.Environment:
    """The Jinja2 environment, with delimiters that do not collide with C++ and PTX.

    ``templates`` is a folder that is searched before the package's own.
    """
    folders = [*([templates] if templates is not None else []), template_dir()]
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        line_statement_prefix="//%",
        line_comment_prefix="//#",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters["cpp"] = _cpp
    return env


def _command(kind: str, arch: Arch, fields: dict[str, Any], tile: dict[str, Any]) -> str:
    fields = {name: value for name, value in fields.items() if value is not None}  # None is what the command assumes
    options = [f"--set {name}={value}" for name, value in {**fields, **tile}.items()]
    return " ".join(["flashmoe-gen compile", f"--kernel {kind}", f"--arch {arch.name}", *options])


def _symbol(kind: str, spec: MoESpec, arch: Arch, digest: str) -> str:
    shape = f"h{spec.hidden_size}" + (f"_i{spec.intermediate_size}" if kind == "moe" else "") + f"_k{spec.top_k}"
    label = f"{spec.mlp}_{spec.activation}" if kind == "moe" else spec.scoring
    stem = "layer" if kind == "moe" else "router"
    return f"flashmoe_{stem}_{_ACRONYM[spec.dtype]}_{label}_{shape}_{arch.name}_{digest[:8]}"


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _table(rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows))
    return [f"//   {name:<{width}}  {value}" for name, value in rows.items()]


def generate(
    spec: MoESpec,
    *,
    arch: str,
    kernel: KernelKind = "moe",
    tile: TileConfig | None = None,
    instrument: Instrument | None = None,
) -> KernelSource:
    """Generate the source of one kernel.

    The text depends on dtype, MLP, activation, H, I, top_k, flags and tile alone (the router's on its own flags);
    ``max_tokens``, ``world_size``, rank, expert counts, capacity and placement are launch arguments.

    Args:
        spec: what to compute.
        arch: ``"host"`` or ``"sm_80"``, ``"sm_86"``, ``"sm_89"``, ``"sm_90a"``, ``"sm_100"``, ``"sm_103"``, ``"sm_120"``.
        kernel: ``"moe"`` (the fused layer) or ``"router"``.
        tile: tile configuration; default :func:`default_tile`. The router has none.
        instrument: tracing or delays in the fused layer; default none.

    Raises:
        SpecError: the tile is impossible for this spec.
        UnsupportedError: the arch is unknown, or the tile does not fit it.
    """
    target = get_arch(arch)
    if kernel not in ("moe", "router"):
        raise SpecError(f"kernel={kernel!r} is not valid. Must be 'moe' or 'router'.")
    if instrument is not None and instrument.code and kernel == "router":
        raise SpecError(f"{instrument} is not valid for the router. It has neither trace nor delays.")
    instrument = instrument or Instrument()
    plan: KernelPlan | RouterPlan
    parts: Sequence[str]
    tiles: dict[str, Any] = {}
    templates = None
    block_structs: tuple[Struct, ...] = ()
    if kernel == "router":  # one tiling for every spec
        router = router_program(arch)
        plan, parts = router.plan, router.parts
    else:
        tile = tile or default_tile(spec, arch)
        program = resolve(spec, tile.program, arch)
        plan, parts, templates = program.plan(spec, tile, target), program.parts, program.templates
        block_structs = program.structs(tile, plan)
        tiles = {**tile.text_fields(), "program": program.name}
    fields = {name: getattr(spec, name) for name in (_MOE_FIELDS if kernel == "moe" else _ROUTER_FIELDS)}
    # The symbol names the content, and the content holds the symbol: hash the parts instead of the finished text.
    sources = [(part, _template_text(part, templates)) for part in parts]
    name = _symbol(kernel, spec, target, _digest(arch, fields, tiles, instrument.code, vars(plan), sources))
    context = {
        "spec": spec, "tile": tile, "plan": plan, "arch": target, "name": name, "instrument": instrument,
        "structs": MOE_STRUCTS if kernel == "moe" else ROUTER_STRUCTS, "block_structs": block_structs,
    }  # fmt: skip
    command = _command(kernel, target, fields, tiles | instrument.code)
    header = _header(kernel, target, name, fields, tiles | instrument.code, plan, command)
    text = header + render_parts(parts, context, templates)
    return KernelSource(
        text=text,
        name=name,
        arch=arch,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        kind=kernel,
        metadata={"kernel": kernel, "spec": fields, "tile": tiles, "instrument": instrument.code, "command": command},
    )


def _template_text(part: str, templates: Path | None) -> str:
    env = environment(templates)
    try:
        return env.loader.get_source(env, part)[0]  # type: ignore[union-attr]
    except jinja2.TemplateNotFound as error:
        raise SpecError(f"The template part {part} is not in {templates or template_dir()}.") from error


def render_parts(parts: Sequence[str], context: dict[str, Any], templates: Path | None = None) -> str:
    """Render template parts one after the other, those of the PTX library as far as they are used (:mod:`.library`)."""
    return library.join([(part, _rendered(part, context, templates)) for part in parts])


def _rendered(part: str, context: dict[str, Any], templates: Path | None) -> str:
    try:
        return environment(templates).get_template(part).render(context)
    except jinja2.TemplateError as error:  # of a program from outside
        raise SpecError(f"The template part {part} is not valid: {type(error).__name__}: {error}.") from error


def _header(
    kind: str, arch: Arch, name: str, fields: dict[str, Any], tiles: dict[str, Any], plan: KernelPlan | RouterPlan, command: str
) -> str:
    what = "the fused MoE layer: dispatch, experts and combine in one persistent kernel"
    title = what if kind == "moe" else "the MoE router: logits, scores, top-k"
    lines = [
        f"// {name}",
        f"// {title}.",
        f"// Generated by flashmoe_gen for {arch.name}; do not edit.",
        "//",
        "// Spec",
        *_table(fields),
        *(["// Tile", *_table(tiles)] if tiles else []),
        "// Plan",
        *_table(plan.table()),
        "// Reproduce",
        f"//   {command}",
    ]
    return "\n".join(lines) + "\n"
