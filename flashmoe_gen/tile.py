"""What a tuner chooses: the tiles a kernel is cut into, which change its text, and their schedule, which does not."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from .errors import SpecError
from .values import choice, integer

Combine = Literal["route", "rank"]
_MATH = ("tf32", "ffma")
_COMBINE = ("route", "rank")
_MOVED = {"combine": "combine", "lag": "lag", "group": "panel"}  # old field of TileConfig -> field of Schedule
_RANGES = {"lag": (0, 1024), "group": (1, 64), "panel": (1, 64), "ring": (1, 65536)}


def _check_schedule(fields: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(fields, name)
        if value is not None and name == "combine":
            object.__setattr__(fields, name, choice(name, value, _COMBINE, also=" or None"))
        elif value is not None:
            object.__setattr__(fields, name, integer(name, value, *_RANGES[name], words="None or an integer"))


@dataclass(frozen=True)
class Schedule:
    """In which order a kernel's tasks run, and how their results come back: launch arguments, the text is the same for all.

    Args:
        combine: ``"route"`` (and ``None``) returns one row per route; ``"rank"`` lets this rank sum its routes of another rank's
            token before they go back, as far as its pool has room. Ranks need not agree.
        lag: M-blocks whose GEMM1 come between a GEMM1 and its GEMM2 in the task order, ``None``: as many as keep a GEMM2
            from waiting for tiles that have only just been claimed.
        panel: most M-blocks of one expert whose tasks follow each other column by column, so that a weight tile is read
            from memory once; ``None``: several where an expert's weights do not fit L2. A multiple of the tile's
            ``cluster``, or rounded up to one.
        ring: most M-blocks of intermediate that are kept at a time; ``None``: as many as ``lag`` and the processors need.
            At least the tile's ``cluster``; panels and lags that do not fit it are made smaller.

    Raises:
        SpecError: a value is out of range.
    """

    combine: Combine | None = None
    lag: int | None = None
    panel: int | None = None
    ring: int | None = None

    def __post_init__(self) -> None:
        _check_schedule(self, ("combine", "lag", "panel", "ring"))

    def replace(self, **changes: object) -> Schedule:
        """A copy with some fields changed (validated again)."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into tiles: what its text depends on, beside the spec.

    Args:
        block_m: rows of an M-block.
        block_n: output columns of a tile; of a gated GEMM1 half of them are gate, half up.
        block_k: elements per stage of the shared-memory pipeline (GPU).
        stages: depth of that pipeline (GPU).
        warps_m, warps_n: grid of MMA warps over a tile (GPU).
        math: matrix arithmetic of float32: ``"tf32"`` (matrix units, operands rounded to nearest) or ``"ffma"``.
            Other dtypes have one way and take ``None``.
        combine, lag, group: deprecated, go in the next version: fields of :class:`Schedule` (``group`` is its ``panel``).
        cluster: blocks that take neighbouring M-blocks together and load their weights once for all, or, where there are few
            rows, neighbouring tiles or parts of one; 2 for the wgmma program alone (and for the host, where it only groups tasks).
        program: block program by name, see :mod:`flashmoe_gen.programs`; ``None`` takes the first that runs the spec.

    Raises:
        SpecError: a value is out of range.
    """

    block_m: int
    block_n: int
    block_k: int = 64
    stages: int = 1
    warps_m: int = 1
    warps_n: int = 1
    math: Literal["tf32", "ffma"] | None = None
    combine: Combine | None = None
    lag: int | None = None
    group: int | None = None
    cluster: int = 1
    program: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block_m", 1, 256),
            ("block_n", 2, 512),
            ("block_k", 8, 512),
            ("stages", 1, 16),
            ("warps_m", 1, 8),
            ("warps_n", 1, 8),
            ("cluster", 1, 2),
        ):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high, words="an integer"))
        if self.math is not None:
            object.__setattr__(self, "math", choice("math", self.math, _MATH, also=" or None"))
        if self.program is not None:
            if not isinstance(self.program, str):
                raise SpecError(f"program={self.program!r} is not valid. Must be the name of a block program, or None.")
            object.__setattr__(self, "program", str(self.program))
        _check_schedule(self, tuple(_MOVED))
        if self.block_n % 2:
            raise SpecError(f"block_n={self.block_n} is not valid. Must be even: a gated tile is half gate, half up.")
        if moved := [name for name in _MOVED if getattr(self, name) is not None]:
            fields = ", ".join(f"{_MOVED[name]}=" for name in moved)
            warnings.warn(
                f"TileConfig({', '.join(f'{name}=' for name in moved)}) is deprecated: pass schedule=Schedule({fields}).",
                DeprecationWarning,
                stacklevel=3,
            )

    def replace(self, **changes: object) -> TileConfig:
        """A copy with some fields changed (validated again)."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def text_fields(self) -> dict[str, Any]:
        """The fields that the kernel's text depends on, by name."""
        return {name: value for name, value in vars(self).items() if name not in _MOVED}


def resolve_schedule(tile: TileConfig, schedule: Schedule | None) -> Schedule:
    """The schedule of a layer: the one given, else what the tile's deprecated fields say.

    Raises:
        SpecError: both say something, or one is something else.
    """
    for name, value, kind in (("tile", tile, TileConfig), ("schedule", schedule, Schedule)):
        if not isinstance(value, kind) and not (value is None and kind is Schedule):
            raise SpecError(f"{name} is a {type(value).__name__}. Must be a flashmoe_gen.{kind.__name__}.")
    old = {new: getattr(tile, name) for name, new in _MOVED.items()}
    if schedule is None:
        return Schedule(**old)
    if said := [name for name, new in _MOVED.items() if old[new] is not None]:
        raise SpecError(f"TileConfig({said[0]}={getattr(tile, said[0])!r}) and schedule= are not valid together. Use schedule=.")
    return schedule
