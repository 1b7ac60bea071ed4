"""README.md: every Python block runs as pasted, every command is one, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flashmoe_gen.cli import app
from flashmoe_gen.launch.cuda import device_count

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
# What it needs, by the comment before it, and the code.
BLOCKS = re.findall(r"^(?:<!-- needs: (.*?) -->\n)?```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
NEEDS = {
    "": lambda: True,
    "torch": lambda: importlib.util.find_spec("torch") is not None,
    "cupy and a GPU": lambda: device_count() > 0,
}
COMMANDS = re.findall(r"flashmoe-gen [^`\n|&]*(?:\n[^`\n]+(?=`))?", TEXT.replace("```", "\n"))


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == TEXT.count("```python") >= 4
    assert sum(need == "" for need, _ in BLOCKS) >= 2, "those that run on every machine"
    assert {need for need, _ in BLOCKS} <= set(NEEDS)


@pytest.mark.parametrize(
    ("need", "code"), BLOCKS, ids=[f"line {TEXT[: TEXT.index(code)].count(chr(10)) + 1}" for _, code in BLOCKS]
)
def test_block_runs_as_pasted(need: str, code: str, tmp_path: Path) -> None:
    if not NEEDS[need]():
        pytest.skip(f"needs {need}")
    program = tmp_path / "pasted.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "it prints what came out"
    assert not re.search(r"\bnan\b", done.stdout)


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\n", " "))


def test_the_commands_are_commands() -> None:
    """Their options are parsed; nothing runs."""
    found = [words_of(command)[1:] for command in COMMANDS if "..." not in command]
    assert len(found) >= 8 and {words[0] for words in found} >= {
        "demo",
        "generate",
        "compile",
        "bench",
        "trace",
        "info",
        "cache",
    }
    group = typer.main.get_command(app)
    for words in found:
        command = group
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        command.make_context(command.name, words)


def test_the_demo_of_the_readme_prints_these_lines(tmp_path: Path) -> None:
    """The same headings and checks, whatever the numbers are."""
    (shown,) = re.findall(r"^```text\n(qwen3-30b-a3b: spec and plan\n.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    line = "demo --experts 16 --tokens 3"
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe_gen", *line.split()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FLASHMOE_CACHE_DIR": str(tmp_path)},  # it shows kernels that are compiled now
    )

    def shape(text: str) -> list[str]:
        kernels = re.sub(r"flashmoe_\w+", "flashmoe", text)
        plain = re.sub(r"[0-9a-f]{12}|\d[\d.]*(e[+-]?\d+)?|(bytes|[KMG]iB|from the cache|in # s)", "#", kernels)
        return [re.sub(r"[# x]+", " ", line).strip() for line in plain.splitlines()]

    wanted, printed = shape(shown), shape(done.stdout)
    missing = [line for line in wanted if line != "..." and line not in printed]
    assert not missing, printed


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_it_is_installed_from_the_checkout() -> None:
    """No index has the package, so an extra of it is one of the checkout."""
    assert 'pip install -e ".[cu12]"' in TEXT and not re.findall(r"flashmoe[_-]gen\[", TEXT)


def test_the_examples_are_typed() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "examples"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_where() -> None:
    """Every place that "How it is organised" names is there, and every folder of it is named."""
    (tree,) = re.findall(r"^## How it is organised\n\n((?: {4}.*\n)+)", TEXT, re.MULTILINE)
    folder, named = ROOT, {}
    for line in tree.splitlines():
        indent, words = re.fullmatch(r"( +)((?:\S+  ?)*\S+)(?: {2,}.*)?", line).groups()  # type: ignore[union-attr]
        folder = ROOT if len(indent) == 4 else folder
        for place in words.split():
            assert list(folder.glob(place)), f"{place} is not in {folder}"
        named.setdefault(folder, set()).update(words.split())
        if len(indent) == 4:
            folder = ROOT / words
    assert {place for place in named[ROOT] if place.endswith("/")} >= {"flashmoe_gen/", "templates/", "tests/"}
    for parent in (ROOT / "flashmoe_gen", ROOT / "templates"):
        there = {f"{path.name}/" for path in parent.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
        assert there == {place for place in named[parent] if place.endswith("/")}
