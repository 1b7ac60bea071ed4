"""One idea a file: none is longer than a screen or two of the mind."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashmoe_gen
from flashmoe_gen.render import template_dir

FOLDERS = {"flashmoe_gen": (Path(flashmoe_gen.__file__).parent, "*.py", 400), "templates": (template_dir(), "*", 250)}


@pytest.mark.parametrize("what", FOLDERS)
def test_no_file_is_too_long(what: str) -> None:
    root, pattern, most = FOLDERS[what]
    lines = {path.relative_to(root): len(path.read_text().splitlines()) for path in root.rglob(pattern) if path.is_file()}
    assert len(lines) > 30
    assert not {path: count for path, count in lines.items() if count > most}
