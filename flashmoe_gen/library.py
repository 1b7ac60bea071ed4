"""The PTX library: of its parts, those in a folder ``ptx``, a text holds only the definitions that it names.

A library part is sections with a blank line between them. A section starts with its comment and goes on with definitions
(functions, types, macros), each on lines of its own, with the comments directly above it. A section without definitions is the
title of the part.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import SpecError

# Comments, strings and characters; a quote inside a number is none.
_NOT_CODE = re.compile(r"""(?=[/"'])(?://[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\w)'(?:\\.|[^'\\\n])*')""", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_NAME = re.compile(
    r"""\#\s*define\s+(\w+)
    | using\s+(\w+)\s*=
    | (?:struct|class|enum\s+class|enum)\s+(?:alignas\s*\([^)]*\)\s*)?(\w+)
    | constexpr\s[^(;{]*?(\w+)\s*[={\[]
    | (\w+)\s*\(""",
    re.VERBOSE,
)


@dataclass
class _Definition:
    name: str
    lines: range  # from 1, the comments above it included
    uses: set[str]


_Section = tuple[range, list[_Definition]]  # the lines of its comment, what it defines


def is_library(part: str) -> bool:
    """Whether a template part belongs to the library."""
    return "ptx" in PurePosixPath(part).parent.parts


def code_of(text: str) -> str:
    """The text without comments and with empty strings, on the same lines."""
    return _NOT_CODE.sub(lambda match: ('""' if match[0][0] == '"' else " ") + "\n" * match[0].count("\n"), text)


def identifiers(text: str) -> set[str]:
    """The words of the code; not those of comments and strings."""
    return set(_IDENTIFIER.findall(code_of(text)))


def join(parts: Sequence[tuple[str, str]]) -> str:
    """One text of rendered parts, each marked with ``#line`` so that errors point at the template.

    Args:
        parts: name and text of each. A library part keeps what the other parts name, and what that names in turn; one of which
            nothing is named leaves no trace. All definitions of one name stay together.

    Raises:
        SpecError: a library part holds something other than definitions; names the part and the line.
    """
    library = {part: list(_sections(part, text)) for part, text in parts if is_library(part)}
    uses: dict[str, set[str]] = defaultdict(set)
    for _, definitions in itertools.chain(*library.values()):
        for definition in definitions:
            uses[definition.name] |= definition.uses
    pending = set().union(*(identifiers(text) for part, text in parts if part not in library)) if library else set()
    named: set[str] = set()
    while pending:
        name = pending.pop()
        if name in uses and name not in named:
            named.add(name)
            pending |= uses[name]
    whole = '\n#line 1 "{}"\n{}'
    return "".join(_cut(part, text, library[part], named) if part in library else whole.format(part, text) for part, text in parts)


def _cut(part: str, text: str, sections: list[_Section], named: set[str]) -> str:
    if not any(definition.name in named for _, definitions in sections for definition in definitions):
        return ""
    kept: list[int] = []
    for heading, definitions in sections:
        stay = [definition for definition in definitions if definition.name in named]
        if stay or not definitions:
            blank = [heading.start - 1] if kept else []
            kept += itertools.chain(blank, heading, *(definition.lines for definition in stay))
    lines = ["", *text.splitlines()]
    out = ["", f'#line {kept[0]} "{part}"', lines[kept[0]]]
    for before, number in itertools.pairwise(kept):
        line = lines[number]
        jump = [f"#line {number}", line] if line.strip() else ["", f"#line {number + 1}"]
        out += [line] if number == before + 1 else jump
    return "\n".join(out) + "\n"


def _sections(part: str, text: str) -> Iterator[_Section]:
    lines = text.splitlines()
    codes = [code.strip() for code in code_of(text).splitlines()]

    def behind_comments(number: int) -> int:
        while number < len(lines) and lines[number].strip() and not codes[number]:
            number += 1
        return number

    number = 0
    while number < len(lines):
        start, number = number, behind_comments(number)
        heading = range(start + 1, number + 1)
        definitions: list[_Definition] = []
        while number < len(lines) and lines[number].strip():
            start, number = number, behind_comments(number)
            end = _end(codes, number)
            code = "\n".join(codes[number:end])
            name = _name(code)
            if name == "static_assert" and definitions:  # goes with what it is about
                definitions[-1].lines = range(definitions[-1].lines.start, end + 1)
                definitions[-1].uses |= identifiers(code)
            elif name is None or name == "static_assert":
                raise SpecError(f"{part}:{number + 1} is not valid. A part of the PTX library must hold definitions alone.")
            else:
                definitions.append(_Definition(name, range(start + 1, end + 1), identifiers(code)))
            number = end
        if heading or definitions:
            yield heading, definitions
        number += 1


def _end(codes: list[str], start: int) -> int:
    """The line behind a definition that starts at ``start``; both from 0."""
    depth = 0
    for number in range(start, len(codes)):
        code = codes[number]
        depth += sum(code.count(opening) - code.count(closing) for opening, closing in ("()", "[]", "{}"))
        macro = codes[start].startswith("#") and not code.endswith("\\")
        if macro or (depth == 0 and code.endswith((";", "}"))):
            return number + 1
    return len(codes)


def _name(code: str) -> str | None:
    if re.match(r"\s|$|#(?!\s*define\b)", code):  # nothing behind a comment, or a directive
        return None
    found = _NAME.search(re.sub(r"^template\s*<[^>]*>", "", code))
    return found[found.lastindex or 0] if found else None
