"""A struct has the same layout in C++ as in NumPy."""

from __future__ import annotations

import ctypes
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_gen.args import MOE_STRUCTS, ROUTER_STRUCTS, mma_structs, wgmma_structs
from flashmoe_gen.cache import Cache
from flashmoe_gen.errors import CompileError
from flashmoe_gen.launch.host import load_library
from flashmoe_gen.structs import Enum, Field, Struct, struct

HEAD = """#include <cstddef>
#include <cstdint>
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using Element = unsigned short;
using Input = Element;
using Weight = Element;
using Bias = Element;
using Middle = Element;
using Returned = Element;
using Output = Element;
using Acc = float;
enum class TaskKind : u32 { closed };
"""
INNER = struct("Inner", ("wide", "u64"), ("tag", "u8"))
TINY = Enum("Tiny", {"no": "", "yes": "not no"}, "u8")
TYPES = ["bool", "u8", "u32", "int", "float", "u64", "i64", "const char*", TINY, INNER]


def compiled(text: str) -> ctypes.CDLL:
    digest = hashlib.sha256(text.encode()).hexdigest()
    built = Cache().build(text, name="offsets", arch="host", digest=digest, metadata={"command": "none"})
    return load_library(built.path)


def check(defined: list[Enum | Struct]) -> None:
    """Compare every offset with the compiler's; sizes are asserted in the text itself."""
    structs = [one for one in defined if isinstance(one, Struct)]
    places = [f"offsetof({one.name}, {field.name})" for one in structs for field in one.fields]
    text = HEAD + "\n".join(one.cpp for one in defined)
    text += f'\nextern "C" const std::size_t offsets[] = {{{", ".join(places)}}};\n'
    found = list((ctypes.c_size_t * len(places)).in_dll(compiled(text), "offsets"))
    assert found == [one.dtype.fields[field.name][1] for one in structs for field in one.fields]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    members=st.lists(
        st.lists(
            st.tuples(st.sampled_from(TYPES), st.sampled_from([(), (3,), (2, 3)]), st.sampled_from([0, 0, 16])), min_size=1
        ),
        min_size=5,
        max_size=20,
    )
)
def test_any_struct(members: list[list[tuple[str | Enum | Struct, tuple[int, ...], int]]]) -> None:
    made = [
        Struct(f"S{n}", tuple(Field(f"m{i}", *field[:1], "", *field[1:]) for i, field in enumerate(fields)))
        for n, fields in enumerate(members)
    ]
    check([TINY, INNER, *made])


def test_the_structs_of_the_kernels() -> None:
    check([*MOE_STRUCTS, *ROUTER_STRUCTS])
    task = [one for one in MOE_STRUCTS if one.name in ("Share", "ReadyBlock", "Task")]
    check([*task, *mma_structs(48, 160)])
    check([*task, *wgmma_structs(128, 384, 5, 2)])


def test_another_layout_does_not_compile() -> None:
    text = HEAD + INNER.cpp.replace("unsigned char", "u64 more, ")
    with pytest.raises(CompileError, match="Inner is laid out otherwise"):
        compiled(text + '\nextern "C" const int offsets[] = {0};\n')
