"""What a block program is: one way in which the blocks of a GPU, or the threads of a CPU, run the tasks of the fused layer."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..arch import Arch
from ..errors import SpecError, UnsupportedError
from ..plan import KernelPlan
from ..spec import MoESpec
from ..structs import Struct
from ..tile import TileConfig

# The PTX library: a text holds what it names of it. `types` is what the wrappers and every GPU part are written with.
PTX = (
    "gpu/types.cuh",
    *(
        f"gpu/ptx/{part}.cuh"
        for part in (
            "memory", "atomics", "copy", "matrix", "wgmma", "mbarrier", "barrier", "cluster", "convert", "arithmetic",
            "special",
        )
    ),
)  # fmt: skip

# The part of every program that is the in-kernel operating system, in the order the data flows.
PROTOCOL = tuple(
    f"protocol/{part}.cuh"
    for part in (
        "queue", "call", "trace", "delay", "send", "scan", "planner", "dispatch", "subscriber", "rows", "counts", "scheduler",
        "processor", "slot", "combine", "leave", "kernel",
    )
)  # fmt: skip


@dataclass(frozen=True)
class TensorBox:
    """How a kernel loads matrices ``[count, rows, columns]`` through a tensor map (PTX ISA, Tensor Memory Access).

    Attributes:
        name: the field of ``MoEArgs`` with their address; ``<name>_expert_stride`` and ``<name>_row_stride`` go with it, or they
            follow each other.
        count: the field of ``MoEArgs`` with their number.
        rows, columns: of one matrix, in elements.
        box_rows, box_columns: of one load.
        size: bytes of an element.
    """

    name: str
    count: str
    rows: int
    columns: int
    box_rows: int
    box_columns: int
    size: int

    @property
    def row_bytes(self) -> int:
        """From a row to the next where rows follow each other."""
        return self.columns * self.size


class BlockProgram(abc.ABC):
    """One block program: a subclass, its template parts, and an instance of it given to :func:`~flashmoe_gen.programs.register`.

    Attributes:
        name: what ``TileConfig.program`` calls it.
        archs: names of the architectures it runs on.
        dtypes: element types it has.
        parts: its template parts, in the order in which one needs the other.
        templates: a folder of its own that is searched for parts before the package's; ``None``: it has none.
    """

    name: ClassVar[str]
    archs: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    templates: ClassVar[Path | None] = None

    def runs(self, spec: MoESpec, arch: Arch) -> bool:
        """Whether there is a kernel of this program for a spec on an architecture, with some tile."""
        return arch.name in self.archs and spec.dtype in self.dtypes

    @abc.abstractmethod
    def default_tile(self, spec: MoESpec, arch: Arch) -> TileConfig:
        """The tile used when none is given: right on every arch of its kind, tuned on none."""

    @abc.abstractmethod
    def plan(self, spec: MoESpec, tile: TileConfig, arch: Arch) -> KernelPlan:
        """The numbers of a kernel.

        Raises:
            SpecError: the tile is impossible for this spec.
            UnsupportedError: it is impossible on this arch.
        """

    @abc.abstractmethod
    def tiles(self, spec: MoESpec, arch: Arch) -> Iterator[TileConfig]:
        """The tiles worth trying; :meth:`plan` refuses those that are impossible."""

    def structs(self, tile: TileConfig, plan: KernelPlan) -> tuple[Struct, ...]:
        """What its parts find as ``block_structs``: the structs of a block's shared memory, one before those that hold it."""
        return ()

    def tensor_boxes(self, spec: MoESpec, tile: TileConfig, plan: KernelPlan) -> tuple[TensorBox, ...]:
        """The tensor maps that the kernel takes after its arguments, in this order."""
        return ()


def check_math(spec: MoESpec, tile: TileConfig, arch: Arch, supported: tuple[str, ...]) -> None:
    """Refuse an arithmetic of float32 that a program does not have.

    Raises:
        SpecError: the dtype has only one.
        UnsupportedError: not among the ``supported``.
    """
    if tile.math is None:
        return
    if spec.dtype != "float32":
        raise SpecError(f"math={tile.math!r} is not valid for {spec.dtype}. It chooses the arithmetic of float32 alone.")
    if tile.math not in supported:
        raise UnsupportedError(
            f"math={tile.math!r} is not supported on {arch.name!r}, whose float32 is IEEE. "
            f"Supported: {', '.join(map(repr, supported))} or None."
        )


def check_shared(tile: TileConfig, stage_bytes: int, shared_bytes: int, arch: Arch) -> None:
    """Refuse a tile whose block needs more shared memory than the arch has.

    Raises:
        UnsupportedError: names both.
    """
    if shared_bytes > arch.shared_bytes:
        raise UnsupportedError(
            f"stages={tile.stages} of {stage_bytes} bytes need {shared_bytes} bytes of shared memory; "
            f"{arch.name} has {arch.shared_bytes} per block. Take fewer stages or a smaller tile."
        )
