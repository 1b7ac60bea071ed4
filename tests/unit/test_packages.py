"""The optional packages: advice that can be pasted, CuPy's import where its cache folder cannot be made, tested pairs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_gen import packages
from flashmoe_gen.cli import info
from flashmoe_gen.errors import FlashMoEError, UnsupportedError

Patch = pytest.MonkeyPatch

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no CuPy here")

METADATA = [
    "numpy>=2.1.2",
    'cupy-cuda12x>=14; extra == "cu12"',
    "nvidia-cuda-nvrtc-cu12<12.10,>=12.9.86; extra == 'cu12'",
    'cupy-cuda13x>=14; extra == "cu13"',
    'flashmoe_gen[cu12]; extra == "ep-cu12"',
    'mpi4py>=4; extra == "ep-cu12"',
]


@pytest.fixture
def metadata(monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)


def test_pip_command(metadata: None) -> None:
    assert packages.pip_command("cu12") == "pip install 'cupy-cuda12x>=14' 'nvidia-cuda-nvrtc-cu12<12.10,>=12.9.86'"
    assert packages.pip_command("ep-cu12") == packages.pip_command("cu12") + " 'mpi4py>=4'"


def test_pip_command_of_a_checkout_that_is_not_installed(monkeypatch: Patch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert packages.pip_command("cu12") == 'pip install -e ".[cu12]"'


@pytest.mark.parametrize("extra", ["cu12", "cu13", "ep-cu12", "ep-cu13"])
def test_pip_command_of_this_installation(extra: str) -> None:
    """What pip gets are requirements of packages that exist elsewhere, not of this one, which is on no index."""
    words = shlex.split(packages.pip_command(extra))
    assert words[:2] == ["pip", "install"] and len(words) >= 6
    for word in words[2:]:
        assert re.fullmatch(r"[a-z][a-z0-9_-]*[<>=][\w.,<>=]+", word), word
        assert not word.startswith("flashmoe")


def test_advice_is_for_the_cupy_that_is_here(metadata: None, monkeypatch: Patch) -> None:
    here = {"cupy-cuda13x": "14.2"}
    monkeypatch.setattr(packages, "version", here.get)
    assert packages.advice() == "`pip install 'cupy-cuda13x>=14'` (CUDA 13)"
    here.clear()
    assert "(CUDA 12) or `pip install" in packages.advice() and packages.advice().endswith("(CUDA 13)")


def test_nothing_advises_what_no_index_has() -> None:
    texts = [*(ROOT / "flashmoe_gen").rglob("*.py"), ROOT / "README.md"]
    for path in texts:
        for line in path.read_text("utf-8").splitlines():
            assert not re.search(r"pip install .*flashmoe_gen\[", line) or "index" in line, f"{path}: {line}"


def test_pairs_are_what_the_extras_pin() -> None:
    for extra, pair in packages.NVSHMEM_PAIRS.items():
        (line,) = re.findall(rf"^{extra} = \[(.*)\]$", PYPROJECT, re.MULTILINE)
        for name, number in pair.items():
            assert f'"{name}=={number}"' in line


@pytest.mark.parametrize("cuda", ["cu12", "cu13"])
def test_nvshmem_pair(cuda: str, monkeypatch: Patch) -> None:
    pair = dict(packages.NVSHMEM_PAIRS[f"ep-{cuda}"])
    here: dict[str, str] = {}
    monkeypatch.setattr(packages, "version", here.get)
    with pytest.raises(UnsupportedError, match="NVSHMEM is not installed: `pip install"):
        packages.check_nvshmem()
    here |= pair
    assert packages.check_nvshmem() == f"nvshmem4py-{cuda} 0.4.1 with nvidia-nvshmem-{cuda} 3.4.5"
    for name in pair:
        for version in ("3.8.0", None):
            with monkeypatch.context() as patch:
                patch.setattr(packages, "version", {**pair, name: version}.get)
                with pytest.raises(UnsupportedError) as caught:
                    packages.check_nvshmem()
            for word in (f"{name} {version or '(not installed)'}", "0.4.1", "3.4.5", "pip install", cuda):
                assert word in str(caught.value)


def test_nvshmem_of_the_cupy_that_is_here(monkeypatch: Patch) -> None:
    pairs = packages.NVSHMEM_PAIRS
    here = {**pairs["ep-cu12"], **pairs["ep-cu13"], "nvidia-nvshmem-cu12": "3.8.0", "cupy-cuda13x": "14.2"}
    monkeypatch.setattr(packages, "version", here.get)
    assert "cu13" in packages.check_nvshmem()


@pytest.mark.parametrize(
    "here,usable,words",
    [
        ({}, False, "NVSHMEM is not installed"),
        (packages.NVSHMEM_PAIRS["ep-cu12"], True, "nvidia-nvshmem-cu12 3.4.5"),
        ({"nvidia-nvshmem-cu13": "3.8.0"}, False, "nvidia-nvshmem-cu13 3.8.0 was not tested"),
    ],
)
def test_info_tells_the_state_of_nvshmem(here: dict[str, str], usable: bool, words: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(packages, "version", here.get)
    state = info.collect()["usable"]["ranks that are processes, on GPUs"]
    assert state["usable"] is usable and words in state["detail"]


def test_info_tells_what_starts_processes(monkeypatch: Patch) -> None:
    for here, words in ({}, "mpi4py is not installed"), ({"mpi4py": "4.1.2"}, "mpirun with mpi4py 4.1.2"):
        monkeypatch.setattr(packages, "version", here.get)
        state = info.collect()["usable"]["ranks that are processes, on the host"]
        assert state["usable"] and words in state["detail"]


def test_cupy_that_is_not_installed(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as importing it does then
    with pytest.raises(UnsupportedError, match="CuPy is not installed: `pip install"):
        packages.import_cupy()


@pytest.mark.parametrize(
    "error", [ImportError("libcuda"), ModuleNotFoundError("No module named 'fastrlock'"), OSError("x")]
)
def test_cupy_that_is_installed_but_broken(error: Exception, monkeypatch: Patch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(FlashMoEError, match="CuPy is installed, but cannot be imported") as caught:
        packages.import_cupy()
    assert str(error) in str(caught.value) and "pip install" not in str(caught.value)
    assert not isinstance(caught.value, UnsupportedError)


PROBE = """
import os, sys
from flashmoe_gen import packages
packages.import_cupy()
from flashmoe_gen.compile import compile_text
compile_text('extern "C" __global__ void k() {}', name="k", arch="sm_80")
print(os.environ.get("CUPY_CACHE_DIR"))
if os.fork() == 0:
    sys.exit()  # runs what the parent registered for its own exit
os.wait()
assert os.path.isdir(os.environ.get("CUPY_CACHE_DIR") or "/")
"""


@needs_cupy
@pytest.mark.parametrize(
    "case", ["home is a file", "home is absent", "folder is a file", "home is fine", "folder is set"]
)
def test_cupys_cache_folder_is_optional(case: str, tmp_path: Path) -> None:
    """Where CuPy could not make its folder, it gets one for as long as the process lives."""
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    file, temporary, home = tmp_path / "file", tmp_path / "tmp", tmp_path / "home"
    file.write_text("x")
    temporary.mkdir()
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CUPY_CACHE_DIR", "HOME")}
    environment |= {"TMPDIR": str(temporary), "FLASHMOE_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(home)}
    environment |= {
        "home is a file": {"HOME": str(file)},
        "home is absent": {"HOME": "/proc/absent"},
        "folder is a file": {"CUPY_CACHE_DIR": str(file)},
        "folder is set": {"CUPY_CACHE_DIR": str(tmp_path / "mine")},
    }.get(case, {})
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.strip()
    if case == "home is fine":
        assert used == "None" and (home / ".cupy/kernel_cache").is_dir()
    elif case == "folder is set":
        assert used == str(tmp_path / "mine") and os.path.isdir(used)
    else:
        assert used.startswith(str(temporary)) and not list(temporary.iterdir()) and not list(home.iterdir())


@needs_cupy
def test_no_place_for_cupys_folder(tmp_path: Path) -> None:
    code = (
        "import tempfile; tempfile.tempdir = '/proc/absent'\nfrom flashmoe_gen import packages\npackages.import_cupy()"
    )
    environment = {**os.environ, "HOME": "/dev/null"}
    environment.pop("CUPY_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FlashMoEError" in done.stderr and "Set CUPY_CACHE_DIR" in done.stderr


def test_oldest_versions_are_named() -> None:
    """.ci/run installs the oldest of everything that the package needs to run."""
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "oldest.py", "cu12"], capture_output=True, text=True, check=True
    )
    names = {line.partition("==")[0].replace("-", "_") for line in done.stdout.split()}
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    needed = {name.replace("-", "_") for name in re.findall(r'^  "([\w-]+)>=', block, re.MULTILINE)}
    assert len(needed) >= 7 and needed <= names
