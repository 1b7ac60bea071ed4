"""The PTX library: what a text takes of it, and where compiler errors then point."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import flashmoe_gen as fmg
from flashmoe_gen.library import join

PART = "gpu/ptx/part.cuh"
LIBRARY = """\
// ---- Title ----

// First section.
#define TWO 2
using Word = unsigned;
static_assert(sizeof(Word) >= TWO);
int used(Word a) {

  return int(a);
}
// Of used().
int unused(int a) { return a; }
int used(int a, int b) { return a + b; }

// Second section: inner().
template <int kCount>
int inner(int (&d)[kCount]) {
  asm("unused(%0);" : "+r"(d[0]));  // not_named()
  return d[0];
}
int outer() {
  int d[3] = {};
  return inner(d);
}

// Third section.
struct alignas(64) Map {
  Word word[4];
};
constexpr int kLimit = 3;
int not_named() { return kLimit; }
"""


def text(rest: str, library: str = LIBRARY) -> str:
    return join([(PART, library), ("rest.cuh", rest)])


def test_what_is_not_named_goes_with_its_comment_and_its_section() -> None:
    cut = text("int x = used(1u);")
    assert "int used(Word a) {\n\n  return int(a);\n}\n" in cut
    assert "unused" not in cut and "// Of used()" not in cut and "Second section" not in cut and "Third section" not in cut
    assert cut.count("// ---- Title ----") == cut.count("// First section.") == 1


def test_overloads_stay_together() -> None:
    assert "int used(int a, int b)" in text("int x = used(1u);")


def test_what_a_wrapper_needs_stays_and_what_that_is_made_of() -> None:
    cut = text("int x = outer();")
    assert "int inner(" in cut and "template <int kCount>" in cut and "// Second section" in cut
    assert "using Word = unsigned;" in (cut := text("Map map;")) and "sizeof(Word) >= TWO" in cut and "#define TWO" in cut
    assert "constexpr int kLimit" in text("int x = not_named();")


@pytest.mark.parametrize("rest", ["// used()", "/* used(\n1) */", 'auto s = "used(1) \\" used(2)";', "char c = '\"'; // used", ""])
def test_a_comment_or_a_string_names_nothing(rest: str) -> None:
    assert text(rest) == f'\n#line 1 "rest.cuh"\n{rest}'


def test_code_between_strings_names_something() -> None:
    assert "int used" in text("auto a = \"'\"; int x = used(1'000u); auto b = \"'\";")


def test_other_parts_stay_whole() -> None:
    parts = [("gpu/platform.cuh", "int nobody() { return 1; }\n"), ("ptx.cuh", "#if 0\n#endif\n")]
    assert join(parts) == "".join(f'\n#line 1 "{part}"\n{content}' for part, content in parts)


@pytest.mark.parametrize("rest", ["used(1u);", "unused(1);", "outer();", "not_named();", "used(1, 1); not_named();", "Map map;"])
def test_every_line_says_where_it_comes_from(rest: str) -> None:
    number, part, checked = 0, "", 0
    for line in text(rest).splitlines():
        if mark := re.fullmatch(r'#line (\d+)(?: "(.+)")?', line):
            number, part = int(mark[1]), mark[2] or part
            continue
        if part == PART and line:
            assert LIBRARY.splitlines()[number - 1] == line
            checked += 1
        number += 1
    assert checked > 3


def test_a_compiler_points_at_the_line_of_the_template(tmp_path: Path) -> None:
    wrong = LIBRARY.replace("return kLimit;", "return absent;")
    (tmp_path / "text.cpp").write_text(text("int x = used(1u);\nint y = not_named();", wrong))
    run = subprocess.run(["g++", "-fsyntax-only", tmp_path / "text.cpp"], capture_output=True, text=True, check=False)
    line = next(number for number, line in enumerate(wrong.splitlines(), 1) if "absent" in line)
    assert f"{PART}:{line}:" in run.stderr and run.returncode != 0
    (tmp_path / "text.cpp").write_text(text("int x = used(1u);\nint y = outer();", wrong))
    subprocess.run(["g++", "-fsyntax-only", tmp_path / "text.cpp"], check=True)


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("int a();\n#if 1\nint b();\n#endif\n", 2),
        ("// Only a title.\n\nint a();\n// Of nothing.\n\nint b();\n", 5),
        ("static_assert(true);\n", 1),
        ("int a();\nint b;\n", 2),
    ],
)
def test_a_library_part_holds_definitions_alone(library: str, line: int) -> None:
    with pytest.raises(fmg.SpecError, match=f"{PART}:{line} is not valid. A part of the PTX library must hold definitions alone."):
        text("int x;", library)
