"""Block programs by name: which one runs a spec, with which tile, and which tiles it could run with.

A program is a subclass of :class:`BlockProgram` and its template parts. The package's own are ``host``, ``mma`` and
``wgmma``; :func:`register` adds others, which run where a tile names them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arch import Arch, get_arch
from ..errors import FlashMoEError, SpecError, UnsupportedError
from ..plan import KernelPlan
from ..spec import MoESpec
from ..tile import TileConfig
from .base import BlockProgram, TensorBox
from .host import HostProgram
from .mma import MmaProgram
from .router import RouterPlan, plan_router, router_program
from .wgmma import WgmmaProgram

__all__ = [
    "BlockProgram",
    "Candidate",
    "RouterPlan",
    "TensorBox",
    "default_tile",
    "get",
    "names",
    "plan_kernel",
    "plan_router",
    "register",
    "resolve",
    "router_program",
    "tile_space",
    "unregister",
]

# The first that runs a spec is its default, so those added later come after the package's own.
_PROGRAMS: dict[str, BlockProgram] = {program.name: program for program in (HostProgram(), WgmmaProgram(), MmaProgram())}
_OWN = frozenset(_PROGRAMS)
_NO_NAMES = ("none", "true", "false")  # ``--set program=none`` says something else


def names() -> list[str]:
    """The names of all programs."""
    return list(_PROGRAMS)


def get(name: str) -> BlockProgram:
    """The program of that name.

    Raises:
        SpecError: there is none.
    """
    if not isinstance(name, str) or name not in _PROGRAMS:
        raise SpecError(f"program={name!r} is not valid. Must be one of {', '.join(map(repr, _PROGRAMS))}.")
    return _PROGRAMS[name]


def register(program: BlockProgram) -> None:
    """Add a program: an instance of a subclass of :class:`BlockProgram`.

    It is there in this process alone: the command line, and so the command that a text says reproduces it, does not know it.

    Raises:
        SpecError: it is none, lacks an attribute, or its name is taken, or no word that a command line can say.
    """
    if not isinstance(program, BlockProgram):  # not the class either: every look at all programs would fail
        raise SpecError(f"register() was given {program!r}. Must be an instance of a subclass of BlockProgram.")
    if missing := [name for name in ("name", "archs", "dtypes", "parts") if not hasattr(program, name)]:
        raise SpecError(f"{type(program).__name__}.{missing[0]} is missing.")
    if not isinstance(program.name, str) or not program.name.isidentifier() or program.name.lower() in _NO_NAMES:
        raise SpecError(f"program={program.name!r} is not valid. Must be a word of letters, digits and underscores.")
    if program.name in _PROGRAMS:
        raise SpecError(f"program={program.name!r} is registered already. Choose another name.")
    _PROGRAMS[program.name] = program


def unregister(name: str) -> None:
    """Remove a program that :func:`register` has added.

    Raises:
        SpecError: there is none of that name, or it is the package's own.
    """
    if name in _OWN or name not in _PROGRAMS:
        raise SpecError(f"program={name!r} is not valid. Must be one that register() has added.")
    del _PROGRAMS[name]


def resolve(spec: MoESpec, name: str | None, arch: str) -> BlockProgram:
    """The program of that name, or with ``None`` the first that runs the spec on the architecture.

    Raises:
        SpecError: there is no program of that name.
        UnsupportedError: it does not run the spec there, or no program does; or the arch is unknown.
    """
    target = get_arch(arch)
    if name is not None:
        get(name)
    fitting = _fitting(spec, target)
    for program in fitting:
        if name in (None, program.name):
            return program
    there = f"Supported there: {', '.join(repr(program.name) for program in fitting)} or None." if fitting else "None is."
    raise UnsupportedError(f"program={name!r} is not supported for {spec.dtype} on {arch!r}. {there}")


def default_tile(spec: MoESpec, arch: str, program: str | None = None) -> TileConfig:
    """The tile used when none is given: right on every arch of its kind, tuned on none.

    Raises:
        SpecError: no such program.
        UnsupportedError: unknown arch, or the program does not run there.
    """
    chosen = resolve(spec, program, arch)
    return _named(chosen, chosen.default_tile(spec, get_arch(arch)))


def plan_kernel(spec: MoESpec, tile: TileConfig, arch: str) -> KernelPlan:
    """Compute the plan of the fused kernel, or refuse the tile with a reason.

    Raises:
        SpecError: the tile is impossible for this spec.
        UnsupportedError: the tile is impossible on this arch, or the arch is unknown.
    """
    return resolve(spec, tile.program, arch).plan(spec, tile, get_arch(arch))


@dataclass(frozen=True)
class Candidate:
    """A tile of the search space.

    Attributes:
        tile: which names its program.
        plan: its numbers; ``None`` when it is impossible.
        reason: why it is, else empty.
    """

    tile: TileConfig
    plan: KernelPlan | None
    reason: str = ""


def tile_space(spec: MoESpec, arch: str, program: str | None = None) -> list[Candidate]:
    """All tiles that the programs of an architecture would try for a spec, the impossible ones with the plan's reason.

    Args:
        spec: what to compute.
        arch: for which architecture.
        program: only this one's; default: every program that runs the spec there.

    Raises:
        SpecError: no such program.
        UnsupportedError: unknown arch, or no program runs the spec there.
    """
    target, first = get_arch(arch), resolve(spec, program, arch)
    chosen = [first] if program is not None else _fitting(spec, target)
    return [_candidate(one, spec, _named(one, tile), target) for one in chosen for tile in one.tiles(spec, target)]


def _named(program: BlockProgram, tile: TileConfig) -> TileConfig:
    """A tile of a program, which need not say so itself: without a name it would be one of the first that runs the spec."""
    return tile if tile.program is not None else tile.replace(program=program.name)


def _fitting(spec: MoESpec, arch: Arch) -> list[BlockProgram]:
    return [program for program in _PROGRAMS.values() if program.runs(spec, arch)]


def _candidate(program: BlockProgram, spec: MoESpec, tile: TileConfig, arch: Arch) -> Candidate:
    try:
        return Candidate(tile, program.plan(spec, tile, arch))
    except FlashMoEError as error:
        return Candidate(tile, None, str(error))
