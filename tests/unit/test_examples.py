"""The examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_host_layer() -> None:
    output = run("host_layer.py")
    assert "rank 0: 100 tokens" in output and "rank 1: 3 tokens" in output


def test_expert_parallel() -> None:
    """As one process; tests/processes runs it under launchers."""
    assert run("expert_parallel.py").startswith("1 rank(s) on ")


@pytest.mark.parametrize("name", ["gpu_layer", "torch_layer"])
def test_the_readme_shows_the_example(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    _, _, code = (EXAMPLES / f"{name}.py").read_text().partition('"""\n\n')
    shown = [*blocks, *("\n".join(pair) for pair in zip(blocks, blocks[1:]))]  # the code, or its two halves
    assert code in shown


def test_generate_kernels(tmp_path: Path) -> None:
    output = run("generate_kernels.py", str(tmp_path / "out"), "--model", "olmoe-1b-7b", "--arch", "host", "sm_90a")
    written = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert written.count(".cpp") == written.count(".cu") == written.count(".so") == 2
    assert written.count(".cubin") == 2 or output.count("not compiled: Compiling for a GPU needs") == 2
