"""One idea a file: how long a template part and a module of the package may be."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashmoe_gen
from flashmoe_gen.render import template_dir

MOST_LINES = {"templates": 250, "package": 400}


@pytest.mark.parametrize("what", ["templates", "package"])
def test_no_file_is_too_long(what: str) -> None:
    root = template_dir() if what == "templates" else Path(flashmoe_gen.__file__).parent
    paths = [path for path in root.rglob("*" if what == "templates" else "*.py") if path.is_file()]
    assert len(paths) > 30
    longer = {str(path.relative_to(root)) for path in paths if len(path.read_text().splitlines()) > MOST_LINES[what]}
    assert not longer
