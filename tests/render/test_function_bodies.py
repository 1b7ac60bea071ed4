"""Jinja chooses whole functions, types and numbers: what is inside a function body is C++ alone."""

from __future__ import annotations

import re

import pytest

from flashmoe_gen.library import is_library
from flashmoe_gen.render import template_dir

EXPRESSION = r"\$\{(?:[^{}]|\{[^{}]*\})*\}"  # with a dict in it, but not a dict of dicts
JINJA = re.compile(rf"{EXPRESSION}|/\*%.*?%\*/|^ *//%.*", re.MULTILINE)
TOKEN = re.compile(
    rf"""(?P<jinja>{JINJA.pattern})|(?P<comment>//.*|/\*[^%](?s:.*?)\*/)|(?P<string>"(?:{EXPRESSION}|\\.|[^"\\])*"|'\\?.')"""
    r"|(?P<code>\w+|->|[^\s\w])",
    re.MULTILINE,
)


def constructs_in_bodies(text: str, *, asm_operands: bool = False) -> list[str]:
    """The Jinja constructs inside function bodies; with ``asm_operands`` those in asm statements are left out.

    A body is a brace after the parameters of a function or a lambda (a parenthesis, ``const`` and a result type may follow)
    or after the last initialiser of a constructor, and all that it encloses. Other braces are types, namespaces and values.
    """
    found: list[str] = []
    bodies: list[bool] = []  # of the open braces, the innermost last: whether it is in a body
    before = ["", ""]  # the last two tokens of code
    in_asm = False
    for token in TOKEN.finditer(text):
        if token.lastgroup != "code":
            constructs = JINJA.findall(token.group())
            if any(bodies) and not (in_asm and asm_operands):
                found += [construct.strip() for construct in constructs]
            continue
        code = token.group()
        if code in ("const", "noexcept", "mutable"):
            continue
        if code == "{":
            bodies.append(any(bodies) or before[1] in (")", "}") or before[0] == "->")
        elif code == "}":
            bodies.pop()
        in_asm = (in_asm or code == "asm") and code != ";"
        before = [before[1], code]
    assert not bodies, "braces that do not pair up"
    return found


def test_no_jinja_inside_a_function_body() -> None:
    found = {}
    for path in sorted(template_dir().rglob("*")):
        name = path.relative_to(template_dir()).as_posix()
        if path.is_file():
            found[name] = constructs_in_bodies(path.read_text(), asm_operands=is_library(name))
    assert {name: constructs for name, constructs in found.items() if constructs} == {}


@pytest.mark.parametrize(
    "text",
    [
        "int f() { return ${n}; }",
        "int f() {\n//% if n\n  g();\n//% endif\n}",
        "int f() {\n  g(); /*% if n %*/ h();\n}",
        "int f() { // ${n}\n}",
        'int f() { return g("${n}"); }',
        "int f() const { return ${n}; }",
        "struct S {\n  S(int a) : b{a} { g(${n}); }\n};",
        "struct S {\n  S(int a) : b(a) { g(${n}); }\n};",
        "const auto f = [](int a) -> T { return ${n}; };",
        "int f() { const char c = '}'; return g(\"}\") /* } */ + ${n}; }  // }",
        "int f() { if (a) { g(); } return T{1} + ${n}; }",
        'void f() { asm("x;" :: "r"(a)); g(${n}); }',
    ],
)
def test_jinja_in_a_body_is_seen(text: str) -> None:
    assert constructs_in_bodies(text, asm_operands=True)


@pytest.mark.parametrize(
    "text",
    [
        "constexpr int kN = ${n};\nconstexpr T kT{{${n}, ${n}}, ${n}};",
        "//% if n\nint f() { return 1; }\n//% else\nint f() { return 2; }\n//% endif",
        "template <int>\nvoid f(float (&d)[${n}]) {}\nint g(int) { return 0; }",
        "struct S {\n  int a[${n}];\n//% for i in range(n)\n  int b${i};\n//% endfor\n  int f() { return 1; }\n};",
        "namespace n {\nenum class E {\n//% for i in n\n  e${i},\n//% endfor\n};\n}",
        'constexpr int kN = ${{"a": 1}[n]};\nint f() { return 1; }  //# ${n}',
        'void f() {\n  asm volatile("{ x; }"\n//% for i in n\n    "${i};"\n//% endfor\n    : "+f"(d[${n}]));\n}',
    ],
)
def test_jinja_outside_of_bodies_is_fine(text: str) -> None:
    assert constructs_in_bodies(text, asm_operands=True) == []


def test_asm_statements_are_excepted_only_where_they_may_be() -> None:
    assert constructs_in_bodies('void f() { asm("${n}"); }') == ["${n}"]
