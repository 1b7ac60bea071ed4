"""The one direction of imports, and that nothing below the launch needs CuPy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flashmoe_gen

ROOT = Path(flashmoe_gen.__file__).parent

# A module imports, when it is imported itself, only from its own room and those before it.
ROOMS = [
    "errors values dtypes arch env files packages trust locks",
    "spec hf_file hf_layers hf_config presets reference instrument",
    "structs args tile plan layout",
    "programs",
    "library render",
    "compile cubin nvrtc link",
    "cache",
    "launch arrays quick scratch comm experts",
    "call counters trace fused placed router layer",
    "tune bench compat",
    "__init__",
    "cli __main__",
]
ROOM_OF = {module: number for number, modules in enumerate(ROOMS) for module in modules.split()}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def run_by_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; not those for type checkers."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(statement.test):
                yield from run_by_import(statement.body)
            yield from run_by_import(statement.orelse)
        elif isinstance(statement, (ast.Try, ast.With)):
            for field in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(statement, field, []):
                    yield from run_by_import(part.body if isinstance(part, ast.ExceptHandler) else [part])


def imports(module: str) -> set[str]:
    """The modules of the package, full dotted names, that this one imports at its top level."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    found = set()
    for statement in run_by_import(ast.parse(path.read_text()).body):
        if not isinstance(statement, ast.ImportFrom) or not statement.level:
            continue
        base = package[: len(package) - statement.level + 1] + (statement.module or "").split(".") * bool(
            statement.module
        )
        for alias in statement.names:
            name = ".".join([*base, alias.name])
            found.add(name if name in MODULES else ".".join(base) or "__init__")
    return found


def room(module: str) -> int:
    return ROOM_OF[module.partition(".")[0]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    assert module.partition(".")[0] in ROOM_OF, f"{module} has no room yet: give it one in ROOMS"
    assert imports(module) <= set(MODULES)
    wrong = [name for name in imports(module) if room(name) > room(module)]
    assert not wrong, f"{module} imports {', '.join(wrong)} of a later room"


def test_no_cycles() -> None:
    list(TopologicalSorter({module: imports(module) - {module, "cli"} for module in MODULES}).static_order())


def test_the_parser_sees_imports() -> None:
    assert {"errors", "spec", "plan"} <= imports("render") and "cache" not in imports("render")
    assert "cache" in imports("launch.host") and "layer" in imports("__init__")
    assert "__init__" in imports("cli") and "cli.demo" in imports("cli")


def without_cupy(code: str) -> str:
    """Run code in a process in which importing CuPy fails."""
    program = f"import sys\nsys.modules['cupy'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_planning_and_rendering_need_no_cupy() -> None:
    without_cupy(
        "import flashmoe_gen as fmg\n"
        "from flashmoe_gen.arch import ARCHS\n"
        "spec = fmg.MoESpec.preset('qwen3-30b-a3b', max_tokens=64)\n"
        "for arch in ARCHS:\n"
        "    for kernel in ('moe', 'router'):\n"
        "        fmg.generate(spec, arch=arch, kernel=kernel)\n"
    )


@pytest.mark.parametrize("words", ["--help", "compile --help", "generate --model qwen3-30b-a3b --arch sm_90a"])
def test_the_command_line_needs_no_cupy(words: str) -> None:
    assert without_cupy(f"from flashmoe_gen.cli import main\nmain({words.split()})\n")
