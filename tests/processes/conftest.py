"""What the tests of real processes share: the launchers of this machine, or why there are none."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "host")]

from spawn import Ended, launch  # noqa: E402


def _beside_python(name: str) -> str | None:
    """A program of this environment, else the first on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


@pytest.fixture(scope="session")
def mpirun() -> list[str]:
    """``mpirun`` with what it needs to start several ranks here, whoever the user is."""
    program = _beside_python("mpirun")
    if program is None:
        pytest.skip("there is no mpirun: `pip install mpich`")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("there is no mpi4py: `pip install mpi4py`")
    version = launch([program, "--version"])
    command = [program, *("--allow-run-as-root --oversubscribe".split() if "Open MPI" in version.out else ())]
    probe = launch([*command, "-n", "2", sys.executable, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"])
    if probe.code or probe.out.split() != ["2", "2"]:
        pytest.skip(f"mpi4py's MPI is not that of {program}: {probe.out} {probe.err[-500:]}")
    return command


@pytest.fixture(scope="session")
def torchrun() -> list[str]:
    """``torchrun`` of this environment."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("there is no torch")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="session")
def run() -> Callable[..., Ended]:
    """Run a command to its end."""
    return launch
