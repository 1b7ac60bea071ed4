"""The wheel holds everything that generating and compiling need."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashmoe_gen as fmg

ROOT = Path(__file__).parents[2]


def test_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "templates").rglob("*") if path.is_file()}
    assert {f"flashmoe_gen/{name}" for name in templates} <= names
    assert "flashmoe_gen/py.typed" in names and any(name.endswith("LICENSE") for name in names)
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)

    code = (
        "import flashmoe_gen as fmg; spec = fmg.MoESpec(64, 64, 8, 2, max_tokens=4);"
        "print(fmg.__file__); print(fmg.generate(spec, arch='host').digest)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    where, digest = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert digest == fmg.generate(fmg.MoESpec(64, 64, 8, 2, max_tokens=4), arch="host").digest
