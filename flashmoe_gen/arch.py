"""The architectures kernels are generated for, and what each one offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import UnsupportedError

Compiler = Literal["c++", "nvrtc"]


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: ``"host"`` or ``"sm_XX"``.
        compiler: what turns a text into an image: the C++ compiler of the machine, or NVRTC.
        shared_bytes: dynamic shared memory one block may use (CUDA C++ Programming Guide,
            "Technical Specifications per Compute Capability"), 0 on the host.
        registers: 32-bit registers of one multiprocessor, 0 on the host.
    """

    name: str
    compiler: Compiler
    shared_bytes: int
    registers: int

    @property
    def source_suffix(self) -> str:
        """Of a file with a kernel's text."""
        return {"c++": ".cpp", "nvrtc": ".cu"}[self.compiler]

    @property
    def image_suffix(self) -> str:
        """Of a file with a compiled kernel: a shared library, or a cubin."""
        return {"c++": ".so", "nvrtc": ".cubin"}[self.compiler]


_KIB = 1024
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("host", "c++", 0, 0),
        Arch("sm_80", "nvrtc", 163 * _KIB, 65536),
        Arch("sm_86", "nvrtc", 99 * _KIB, 65536),
        Arch("sm_89", "nvrtc", 99 * _KIB, 65536),
        Arch("sm_90a", "nvrtc", 227 * _KIB, 65536),
        Arch("sm_100", "nvrtc", 227 * _KIB, 65536),
        Arch("sm_103", "nvrtc", 227 * _KIB, 65536),
        Arch("sm_120", "nvrtc", 99 * _KIB, 65536),
    )
}
GPU_ARCHS = tuple(name for name, arch in ARCHS.items() if arch.compiler == "nvrtc")


def get_arch(name: str) -> Arch:
    """Look an architecture up by name; raise :class:`UnsupportedError` naming the supported ones."""
    try:
        return ARCHS[name]
    except (KeyError, TypeError):
        hint = " Hopper kernels are built for 'sm_90a'." if name == "sm_90" else ""
        raise UnsupportedError(f"arch={name!r} is not supported. Supported: {', '.join(map(repr, ARCHS))}.{hint}") from None
