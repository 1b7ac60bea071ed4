"""Structs and enums of C++ described once: written as C++ here, packed with NumPy there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

# C++ name, NumPy format; "Kernel" is the function pointer of host/runtime.h.
_SCALARS = {
    "bool": ("bool", "?"),
    "u8": ("unsigned char", "u1"),
    "u32": ("u32", "u4"),
    "int": ("int", "i4"),
    "float": ("float", "f4"),
    "u64": ("u64", "u8"),
    "i64": ("long long", "i8"),
    "Kernel": ("Kernel", "u8"),
}


@dataclass(frozen=True)
class Enum:
    """An ``enum class`` whose members count from zero.

    Attributes:
        name: of the enum.
        members: their names, and what each means.
        type: of the value: ``"u32"`` or ``"u8"``.
    """

    name: str
    members: dict[str, str]
    type: str = "u32"

    @property
    def cpp(self) -> str:
        """The definition in C++."""
        lines = [f"  {name},  // {doc}" if doc else f"  {name}," for name, doc in self.members.items()]
        return "\n".join([f"enum class {self.name} : {_SCALARS[self.type][0]} {{", *lines, "};"])


@dataclass(frozen=True)
class Field:
    """One member of a struct.

    Attributes:
        name: of the member.
        type: a scalar, a pointer written ``T*``, an :class:`Enum` or another :class:`Struct`.
        doc: what it means.
        shape: of an array, else empty.
        align: bytes it is aligned to beyond what its type asks for, or 0.
    """

    name: str
    type: str | Enum | Struct
    doc: str = ""
    shape: tuple[int, ...] = ()
    align: int = 0

    @property
    def is_pointer(self) -> bool:
        return isinstance(self.type, str) and self.type.endswith("*")

    @property
    def declaration(self) -> str:
        """The member in C++."""
        kind = _SCALARS.get(self.type, (self.type,))[0] if isinstance(self.type, str) else self.type.name
        aligned = f"alignas({self.align}) " if self.align else ""
        return f"{aligned}{kind} {self.name}{''.join(f'[{count}]' for count in self.shape)}"

    @property
    def element(self) -> np.dtype:
        """The dtype of one element."""
        if isinstance(self.type, Struct):
            return self.type.dtype
        scalar = self.type.type if isinstance(self.type, Enum) else self.type
        return np.dtype("u8" if self.is_pointer else _SCALARS[scalar][1])

    @property
    def alignment(self) -> int:
        return max(self.align, self.type.alignment if isinstance(self.type, Struct) else self.element.itemsize)


@dataclass(frozen=True)
class Struct:
    """A struct with C layout; pointers are 8 bytes."""

    name: str
    fields: tuple[Field, ...]

    @cached_property
    def dtype(self) -> np.dtype:
        """The NumPy structured dtype with the same layout."""
        offsets, end = [], 0
        for field in self.fields:
            offsets.append(-(-end // field.alignment) * field.alignment)
            end = offsets[-1] + field.element.itemsize * prod(field.shape)
        return np.dtype(
            {
                "names": [field.name for field in self.fields],
                "formats": [(field.element, field.shape) if field.shape else field.element for field in self.fields],
                "offsets": offsets,
                "itemsize": -(-end // self.alignment) * self.alignment,
            }
        )

    @property
    def alignment(self) -> int:
        return max(field.alignment for field in self.fields)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize

    @property
    def cpp(self) -> str:
        """The definition in C++, which does not compile where the layout would be another."""
        lines = [f"  {field.declaration};  // {field.doc}" if field.doc else f"  {field.declaration};" for field in self.fields]
        check = f'static_assert(sizeof({self.name}) == {self.size}, "{self.name} is laid out otherwise in args.py");'
        return "\n".join([f"struct {self.name} {{", *lines, "};", check])

    def zeros(self) -> np.ndarray:
        """A one-element array of the struct, all zero."""
        return np.zeros(1, dtype=self.dtype)


def struct(name: str, *fields: tuple[object, ...]) -> Struct:
    """A struct of ``(name, type, doc, shape, align)``, of which the last three may be left out."""
    return Struct(name, tuple(Field(*field) for field in fields))  # type: ignore[arg-type]
