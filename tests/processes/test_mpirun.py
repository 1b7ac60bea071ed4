"""Ranks that mpirun starts, on the host target; cases.py says what each case checks. One start runs many cases."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
from spawn import ROOT, Ended, launch
from world import prebuild

SIZES = (2, 3, 4)
CASES = [*cases.DTYPES, "few_experts"]
Results = Callable[[int], list[dict[str, object]]]


def results_of(folder: Path, ended: Ended, world_size: int) -> list[dict[str, object]]:
    """What each rank wrote."""
    files = [folder / f"{rank}.json" for rank in range(world_size)]
    assert ended.code == 0 and all(file.exists() for file in files), ended
    results = [json.loads(file.read_text()) for file in files]
    assert [each["world_size"] for each in results] == [world_size] * world_size
    return results


@pytest.fixture(scope="module")
def results(mpirun: list[str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all ranks of a world, which has run once."""
    found: dict[int, list[dict[str, object]]] = {}
    prebuild([(cases.spec_of(1, dtype), "moe", None) for dtype in cases.DTYPES])

    def of(world_size: int) -> list[dict[str, object]]:
        if world_size not in found:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            names = [*CASES, *(["many_calls"] if world_size == 3 else [])]
            command = [*mpirun, "-n", world_size, sys.executable, Path(cases.__file__), folder, *names]
            found[world_size] = results_of(folder, launch(command, 200), world_size)
        return found[world_size]

    return of


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_bits_of_one_rank(case: str, world_size: int, results: Results) -> None:
    assert [each.get(case, "it was not reached") for each in results(world_size)] == [""] * world_size


def test_a_thousand_calls_with_changing_counts(results: Results) -> None:
    assert [each.get("many_calls", "it was not reached") for each in results(3)] == [""] * 3


@pytest.mark.parametrize("world_size", [1, 4])
def test_example(world_size: int, mpirun: list[str]) -> None:
    ended = launch([*mpirun, "-n", world_size, sys.executable, ROOT / "examples" / "expert_parallel.py"])
    assert ended.code == 0, ended.err
    (line,) = ended.out.splitlines()
    assert line.startswith(f"{world_size} rank(s) on host, 32 experts, top 8: y of every rank agrees"), line


LATE = """
import sys, time
import flashmoe_gen as fmg
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    time.sleep(float(sys.argv[1]))
    if len(sys.argv) > 2:
        sys.exit()
start = time.monotonic()
try:
    comm = fmg.comm.init()
    sys.stdout.write(f"{comm.rank} of {comm.world_size}\\n")
except fmg.CommError as error:
    sys.stdout.write(f"{time.monotonic() - start:.1f} s: {error}\\n")
"""


def test_a_rank_that_comes_later(mpirun: list[str]) -> None:
    ended = launch([*mpirun, "-n", 3, sys.executable, "-c", LATE, 5])
    assert ended.code == 0, ended.err
    assert sorted(ended.out.splitlines()) == ["0 of 3", "1 of 3", "2 of 3"]


def test_a_rank_that_never_comes(mpirun: list[str]) -> None:
    start = time.monotonic()
    ended = launch([*mpirun, "-n", 2, sys.executable, "-c", LATE, 4, "gone"], FLASHMOE_INIT_TIMEOUT_S="1")
    assert time.monotonic() - start < 30
    (line,) = ended.out.splitlines()
    assert line.startswith("1.0 s: Not all 2 ranks of MPI came to init() within 1 s"), ended
    assert "this is rank 0" in line and "FLASHMOE_INIT_TIMEOUT_S" in line


FOREIGN = """
import os, sys
os.environ["PMI_RANK"], os.environ["PMI_SIZE"] = sys.argv[1:]
import flashmoe_gen as fmg
import mpi4py
from mpi4py import MPI
try:
    print(fmg.comm.init("mpi"))
except fmg.CommError as error:
    print(error)
"""


def test_the_library_of_another_mpi(mpirun: list[str]) -> None:
    """Under another MPI's mpirun the library makes worlds of one rank, here because MPI came before the variables."""
    code = FOREIGN.replace("import os, sys\n", "import os, sys\nfrom mpi4py import MPI\n")
    ended = launch([sys.executable, "-c", code, 2, 4])
    assert ended.code == 0, ended.err
    assert ended.out.startswith("mpirun says rank 2 of 4 (PMI_RANK, PMI_SIZE), but MPI's library, "), ended
    assert "says rank 0 of 1" in ended.out


OWN = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
import flashmoe_gen as fmg
from mpi4py import MPI
if {first}:
    MPI.Init()
comm = fmg.comm.init("mpi")
comm.barrier()
comm.close()
assert MPI.Is_initialized() and not MPI.Is_finalized()
if {first}:
    MPI.Finalize()
print(comm.world_size)
"""


@pytest.mark.parametrize("first", [True, False], ids=["initialised by the user", "initialised by the package"])
def test_who_initialises_finalises(first: bool, mpirun: list[str]) -> None:
    ended = launch([*mpirun, "-n", 2, sys.executable, "-c", OWN.format(first=first)])
    assert (ended.code, ended.out.split()) == (0, ["2", "2"]), ended
