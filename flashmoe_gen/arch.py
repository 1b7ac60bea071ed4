"""The architectures kernels are generated for, and what each one offers."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedError


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: ``"host"`` or ``"sm_XX"``.
        program: the folder of ``templates/`` with its block program.
        shared_bytes: dynamic shared memory one block may use (CUDA C++ Programming Guide,
            "Technical Specifications per Compute Capability"), 0 on the host.
        registers: 32-bit registers of one multiprocessor, 0 on the host.
    """

    name: str
    program: str
    shared_bytes: int
    registers: int

    @property
    def is_host(self) -> bool:
        return self.name == "host"


_KIB = 1024
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("host", "host", 0, 0),
        Arch("sm_80", "sm80", 163 * _KIB, 65536),
        Arch("sm_86", "sm80", 99 * _KIB, 65536),
        Arch("sm_89", "sm80", 99 * _KIB, 65536),
        Arch("sm_90a", "sm80", 227 * _KIB, 65536),
        Arch("sm_100", "sm80", 227 * _KIB, 65536),
        Arch("sm_103", "sm80", 227 * _KIB, 65536),
        Arch("sm_120", "sm80", 99 * _KIB, 65536),
    )
}


def get_arch(name: str) -> Arch:
    """Look an architecture up by name; raise :class:`UnsupportedError` naming the supported ones."""
    try:
        return ARCHS[name]
    except (KeyError, TypeError):
        hint = " Hopper kernels are built for 'sm_90a'." if name == "sm_90" else ""
        raise UnsupportedError(f"arch={name!r} is not supported. Supported: {', '.join(map(repr, ARCHS))}.{hint}") from None
