"""How processes find each other: which launcher it was, and the exchange over TCP among those who know the key."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from spawn import LAUNCHERS, free_port, spawn

import flashmoe_gen as fmg
from flashmoe_gen import comm
from flashmoe_gen.comm import bootstrap, channel, rendezvous
from flashmoe_gen.comm.bootstrap import find, first_node, job_key, launched, slurm_master
from flashmoe_gen.comm.rendezvous import MAX_VALUE, TcpBootstrap
from flashmoe_gen.errors import CommError, SpecError, UnsupportedError

Patch = pytest.MonkeyPatch
KEY = b"k" * 32


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: Patch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS) or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)


# ---- Which launcher ---------------------------------------------------------------------------------------------------

PLAIN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    **PLAIN,
    "RANK": "5",
    "WORLD_SIZE": "8",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "9", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
JOB = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}  # what salloc sets
BATCH = {
    **JOB,
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}  # what the script of a job has beside it
SHELL = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # the interactive step of salloc
SRUN = {**JOB, "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
SRUN_ONE = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
PROXY = {**SRUN_ONE, "SLURM_STEP_ID": "1"}  # mpirun starts its daemons with srun, one a node
PMIX = {"PMIX_NAMESPACE": "prterun-n1-4@1", "PMIX_RANK": "1"}  # prterun, and no size
PMI2 = {**SRUN, "PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "3", "PMI_JOBID": "77.0"}  # srun --mpi=pmi2

FOUND = {
    "nothing": ({}, "single", 0, 1),
    "variables": (PLAIN, "env", 1, 4),
    "variables of one rank": ({**PLAIN, "RANK": "0", "WORLD_SIZE": "1"}, "env", 0, 1),
    "rank and world of one": ({"RANK": "0", "WORLD_SIZE": "1"}, "single", 0, 1),
    "torchrun": (TORCHRUN, "torch", 5, 8),
    "mpirun of MPICH": (HYDRA, "mpi", 2, 3),
    "mpirun of Open MPI": (OPEN_MPI, "mpi", 3, 6),
    "mpirun of one rank": ({**HYDRA, "PMI_RANK": "0", "PMI_SIZE": "1"}, "mpi", 0, 1),
    "srun": (SRUN, "slurm", 2, 4),
    "srun of one task": (SRUN_ONE, "slurm", 0, 1),
    "srun with PMI": (PMI2, "slurm", 2, 4),
    # Nested
    "torchrun under srun": (SRUN_ONE | TORCHRUN, "torch", 5, 8),
    "torchrun under srun, one a node": (SRUN | TORCHRUN, "torch", 5, 8),
    "torchrun under mpirun": (OPEN_MPI | TORCHRUN, "torch", 5, 8),
    "mpirun in a job's script": (BATCH | HYDRA, "mpi", 2, 3),
    "mpirun in salloc's shell": (SHELL | HYDRA, "mpi", 2, 3),
    "mpirun through srun": (PROXY | HYDRA, "mpi", 2, 3),
    "mpirun of Open MPI through srun": (PROXY | OPEN_MPI, "mpi", 3, 6),
    "mpirun on as many nodes": (SRUN | {**HYDRA, "PMI_RANK": "2", "PMI_SIZE": "4"}, "mpi", 2, 4),
    "mpirun of one under srun": (SRUN | {**HYDRA, "PMI_RANK": "0", "PMI_SIZE": "1"}, "mpi", 0, 1),
    "srun with the usual recipe": (SRUN | {"WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "9"}, "slurm", 2, 4),
    "srun and variables that agree": (SRUN | PLAIN | {"RANK": "2"}, "slurm", 2, 4),
    "mpirun and variables that agree": (HYDRA | PLAIN | {"RANK": "2", "WORLD_SIZE": "3"}, "mpi", 2, 3),
    "a program's own ranks in a shell of srun": (SRUN_ONE | PLAIN, "env", 1, 4),
    "a program's own ranks in salloc's shell": (SHELL | PLAIN, "env", 1, 4),
    "a program's own ranks in a job's script": (BATCH | PLAIN, "env", 1, 4),
    # Left over
    "a world without a rank": ({"WORLD_SIZE": "4"}, "single", 0, 1),
    "a world and a master": ({**PLAIN, "RANK": ""}, "single", 0, 1),
    "a rank without a world": ({"RANK": "3"}, "single", 0, 1),
    "PMI_SIZE alone": ({"PMI_SIZE": "4"}, "single", 0, 1),
    "Open MPI's size alone": ({"OMPI_COMM_WORLD_SIZE": "4"}, "single", 0, 1),
    "salloc": (JOB, "single", 0, 1),
    "salloc with a shell of its own": (SHELL, "single", 0, 1),
    "a job's script": (BATCH, "single", 0, 1),
    "a shell of srun --mpi=pmix": (SHELL | {"PMIX_NAMESPACE": "slurm.pmix.77.0", "PMIX_RANK": "0"}, "single", 0, 1),
    "srun --mpi=pmix": (SRUN | {"PMIX_NAMESPACE": "slurm.pmix.77.0", "PMIX_RANK": "2"}, "slurm", 2, 4),
    "PMIX_RANK alone": ({"PMIX_RANK": "2"}, "single", 0, 1),
    "a program's own ranks in a shell of prterun": (PLAIN | PMIX, "env", 1, 4),
    "a shell in a task": ({**SRUN, "SLURM_STEP_ID": ""}, "single", 0, 1),
    "torchrun's name alone": ({"TORCHELASTIC_RUN_ID": "none"}, "single", 0, 1),
    "mpirun, and a world left in the shell": (HYDRA | {"WORLD_SIZE": "8"}, "mpi", 2, 3),
    "mpirun, and half of the variables": (HYDRA | {"WORLD_SIZE": "8", "RANK": "1"}, "mpi", 2, 3),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_auto_finds(name: str) -> None:
    environ, *want = FOUND[name]
    method, rank, world_size, how = launched("auto", environ)
    assert [method, rank, world_size] == want
    assert f"rank {rank} of {world_size}" in how or method == "single"


REASONS = [
    ({}, "no launcher has left its variables"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 does not count without RANK"),
    ({"RANK": "3"}, "RANK=3 does not count without WORLD_SIZE"),
    ({"PMI_SIZE": "4"}, "PMI_SIZE=4 does not count without PMI_RANK"),
    (JOB, "in job 77 of SLURM, but not a task of srun"),
    (BATCH, "in job 77 of SLURM, but not a task of srun"),
]


@pytest.mark.parametrize("environ,reason", REASONS)
def test_why_it_is_alone(
    environ: dict[str, str], reason: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, and a communicator of one rank."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, "flashmoe_gen"), comm.init() as alone:
        assert (alone.rank, alone.world_size) == (0, 1)
    lines = [record.getMessage() for record in caplog.records if "comm.init" in record.getMessage()]
    assert lines == [f"comm.init('auto'): a single process ({reason})"]


WRONG = {
    "no master": ("auto", {"RANK": "1", "WORLD_SIZE": "4"}, "not set: MASTER_ADDR, MASTER_PORT"),
    "no port": ("auto", {**PLAIN, "MASTER_PORT": ""}, "not set: MASTER_PORT"),
    "rank too large": ("auto", {**PLAIN, "RANK": "4"}, "RANK=4 is not valid with WORLD_SIZE=4"),
    "rank no number": ("auto", {**PLAIN, "RANK": "one"}, "RANK='one' is not valid. Must be a whole number."),
    "world no number": ("auto", {**HYDRA, "PMI_SIZE": "-3"}, "PMI_SIZE='-3' is not valid"),
    "world of nobody": ("auto", {**PLAIN, "RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not valid with WORLD_SIZE=0"),
    "srun contradicted": (
        "auto",
        SRUN | PLAIN,
        "srun says rank 2 of 4.*environment says rank 1 of 4.*init.'slurm'.* or",
    ),
    "mpirun contradicted": (
        "auto",
        HYDRA | PLAIN,
        r"mpirun says rank 2 of 3.*comm.init\('mpi'\) or comm.init\('env'\)",
    ),
    "env without": (
        "env",
        {},
        "method='env' needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; not set: RANK, WORLD_SIZE",
    ),
    "env with half": ("env", {"WORLD_SIZE": "4", "RANK": "1"}, "not set: MASTER_ADDR, MASTER_PORT"),
    "env under torchrun": ("env", TORCHRUN, "torchrun itself listens at MASTER_PORT. Use method='torch'"),
    "torch without": ("torch", {}, "method='torch', without an initialised group, needs RANK"),
    "slurm without": ("slurm", {}, "no task of srun .SLURM_STEP_ID is not set"),
    "slurm in a script": ("slurm", BATCH, "no task of srun .in job 77 of SLURM"),
    "slurm in a shell": ("slurm", SHELL, "no task of srun .in job 77 of SLURM"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name: str) -> None:
    method, environ, words = WRONG[name]
    with pytest.raises(SpecError, match=words):
        launched(method, environ)


def test_asked_for_one(monkeypatch: Patch) -> None:
    for name, value in (SRUN | PLAIN).items():
        monkeypatch.setenv(name, value)
    assert find("single") is None
    with pytest.raises(SpecError, match=r"method='mpirun' is not valid. Must be one of 'auto', 'mpi', "):
        find("mpirun")


@pytest.mark.parametrize(
    "environ", [SRUN_ONE, {**PLAIN, "RANK": "0", "WORLD_SIZE": "1"}, {**HYDRA, "PMI_RANK": "0", "PMI_SIZE": "1"}]
)
def test_a_launcher_of_one(environ: dict[str, str], monkeypatch: Patch) -> None:
    """Needs no MPI, and no port."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find("auto") is None


def test_without_mpi4py(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name, value in HYDRA.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=r"method='mpi' needs mpi4py.*pip install mpi4py"):
        find("auto")


class _Mpi:
    """An MPI of two ranks."""

    Is_finalized, Is_initialized = staticmethod(lambda: False), staticmethod(lambda: True)
    Get_library_version = staticmethod(lambda: "Some MPI 1.0, of a test")

    def __init__(self, rank: int, world_size: int) -> None:
        self.COMM_WORLD = self
        self.Get_rank, self.Get_size = lambda: rank, lambda: world_size


def test_a_launcher_that_leaves_no_size(monkeypatch: Patch) -> None:
    for name, value in PMIX.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bootstrap, "_mpi", lambda: _Mpi(1, 2))
    assert launched("auto", os.environ) == ("mpi", 1, 2, "MPI (Some MPI 1.0) says rank 1 of 2")
    monkeypatch.setattr(bootstrap, "_mpi", lambda: _Mpi(0, 1))
    with pytest.raises(CommError, match=r"rank 1 \(PMIX_RANK\), but MPI's library, Some MPI 1.0, says rank 0 of 1"):
        find("auto")


def test_too_many(monkeypatch: Patch) -> None:
    for name, value in (PLAIN | {"WORLD_SIZE": "65"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=r"rank 1 of 65.*more than 64 ranks"):
        find("auto")


class _Group:
    """A torch.distributed that is initialised."""

    is_available = is_initialized = staticmethod(lambda: True)
    get_rank, get_world_size, get_backend = (
        staticmethod(lambda: 1),
        staticmethod(lambda: 2),
        staticmethod(lambda: "nccl"),
    )


def test_an_initialised_group_comes_first(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", _Group)
    for environ in ({}, PLAIN, HYDRA, SRUN, TORCHRUN):
        assert launched("auto", environ)[:3] == ("torch", 1, 2)
    assert launched("auto", {}).how == "torch.distributed (nccl) says rank 1 of 2"
    assert launched("single", {})[:3] == ("single", 0, 1) and launched("env", PLAIN)[:3] == ("env", 1, 4)


NODES = [
    ("n1", "n1"), ("n[1-4]", "n1"), ("n[07-12,20],m3", "n07"), ("gpu-a[3]", "gpu-a3"), ("a,b[1-2]", "a"),
    ("rack[1-2]-n", "rack1-n"), ("r1n[0-3]x,z", "r1n0x"),
]  # fmt: skip


@pytest.mark.parametrize("nodes,first", NODES)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_where_a_step_meets() -> None:
    host, port = slurm_master(SRUN)
    assert host == "127.0.0.1" and 15000 <= port < 32000
    several = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]"}
    assert slurm_master(several) == ("n3", port), "a port of the step's own"
    ports = {slurm_master({**SRUN, "SLURM_STEP_ID": str(step)})[1] for step in range(50)}
    assert len(ports) > 45
    assert slurm_master({**SRUN, "MASTER_ADDR": "here", "MASTER_PORT": "99"}) == ("here", 99)
    with pytest.raises(SpecError, match="MASTER_PORT='65536' is not valid"):
        slurm_master({**SRUN, "MASTER_PORT": "65536"})
    with pytest.raises(SpecError, match="SLURM_STEP_NODELIST='' is not a list"):
        slurm_master({**several, "SLURM_STEP_NODELIST": ""})


def test_keys(monkeypatch: Patch) -> None:
    keys = {job_key("29500"), job_key("29501"), job_key("77", "0"), job_key("77", "1")}
    assert len(keys) == 4 and job_key("29500") in keys
    monkeypatch.setenv("FLASHMOE_SECRET", "what nobody else knows")
    assert job_key("29500") not in keys
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert len({job_key("29500"), *keys}) == 5


@pytest.mark.parametrize(
    "options", [{"target": "gpu"}, {"target": "host", "device": 0}, {"device": -1}, {"device": 0.5}, {"device": True}]
)
def test_arguments_of_init(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"(target|device)=.* is not valid"):
        comm.init("single", **options)


def test_one_process_on_the_host() -> None:
    with comm.init("single", target="host", heap_bytes=1 << 20) as alone:
        assert alone.target == "host"


# ---- The exchange -----------------------------------------------------------------------------------------------------

Make = Callable[..., TcpBootstrap]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes ends of an exchange at a port of its own."""
    port, made = free_port(), []

    def one(rank: int, world_size: int = 3, *, key: bytes = KEY, seconds: float = 20.0, at: int | None = None,
            host: str = "127.0.0.1") -> TcpBootstrap:  # fmt: skip
        made.append(TcpBootstrap("env", rank, world_size, host, at or port, key, seconds))
        return made[-1]

    one.port = port  # type: ignore[attr-defined]
    yield one
    for each in made:
        each.close()


def together(*work: Callable[[], Any]) -> list[Any]:
    """Run all at once; what each returned, or its error."""

    def caught(one: Callable[[], Any]) -> Any:
        try:
            return one()
        except CommError as error:
            return str(error)

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(caught, work))


def gathering(end: TcpBootstrap, value: bytes, what: str = "init()") -> Callable[[], list[bytes]]:
    return lambda: end.gather(value, what)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_everybody_gets_everything_in_order(world_size: int, host: str, make: Make) -> None:
    ends = [make(rank, world_size, host=host) for rank in range(world_size)]
    for turn in range(5):
        values = [bytes([rank, turn]) * (rank * 1000 * turn) for rank in range(world_size)]
        assert together(*(gathering(end, value) for end, value in zip(ends, values))) == [values] * world_size


def test_large_values_have_a_limit(make: Make) -> None:
    ends = [make(rank, 2) for rank in range(2)]
    values = [bytes(MAX_VALUE), b""]
    assert together(*(gathering(end, value) for end, value in zip(ends, values))) == [values] * 2
    with pytest.raises(CommError, match="1048577 bytes of one rank are too many"):
        ends[1].gather(bytes(MAX_VALUE + 1), "init()")


def test_a_rank_may_come_first_or_late(make: Make) -> None:
    """Rank 0 last, so that nothing listens when the others come; and rank 2 after 2 s."""

    def late() -> list[bytes]:
        time.sleep(2)
        return make(2).gather(b"2", "init()")

    def root() -> list[bytes]:
        time.sleep(1)
        return make(0).gather(b"0", "init()")

    assert together(root, gathering(make(1), b"1"), late) == [[b"0", b"1", b"2"]] * 3


def test_one_exchange_after_the_other_at_one_port(make: Make) -> None:
    for _ in range(10):
        ends = [make(rank, 2) for rank in range(2)]
        assert together(*(gathering(end, b"x") for end in ends)) == [[b"x", b"x"]] * 2
        for end in ends:
            end.close()


def test_a_rank_that_never_comes(make: Make) -> None:
    root, leaf = make(0, seconds=1.0), make(1)
    start = time.monotonic()
    for error in together(gathering(root, b""), gathering(leaf, b"")):
        assert error == "Rank 2 did not come to init() within 1 s. FLASHMOE_INIT_TIMEOUT_S sets the limit."
    assert time.monotonic() - start < 5


def test_rank_0_never_comes(make: Make) -> None:
    with pytest.raises(
        CommError, match=r"Rank 1 did not reach rank 0 at 127.0.0.1:\d+ \(MASTER_ADDR, MASTER_PORT\).*nothing listens"
    ):
        make(1, seconds=0.5).gather(b"", "init()")


def test_a_rank_that_stays_away_from_a_later_gather(make: Make) -> None:
    ends = [make(rank, seconds=1.0) for rank in range(3)]
    together(*(gathering(end, b"") for end in ends))
    for error in together(*(gathering(end, b"", "the second") for end in ends[:2])):
        assert "the second" in error and (
            "Rank 2 did not come" in error or "Rank 1 gave up" in error or "Rank 0" in error
        )


@pytest.mark.parametrize("gone", [0, 2])
def test_a_rank_that_ends(gone: int, make: Make) -> None:
    ends = [make(rank) for rank in range(3)]
    together(*(gathering(end, b"") for end in ends))
    ends[gone].close()
    start = time.monotonic()
    for error in together(*(gathering(end, b"", "again") for end in ends if end.rank != gone)):
        assert f"again: rank {gone} has ended" in error
    assert time.monotonic() - start < 5


def test_a_rank_that_ends_while_others_are_awaited(make: Make) -> None:
    root, leaf = make(0), make(1)

    def come_and_go() -> None:
        leaf._end._connect("init()", channel.Deadline(10)).connection.close()  # type: ignore[union-attr]

    assert together(gathering(root, b""), come_and_go)[0] == "init(): rank 1 has ended."


def test_ranks_that_do_different_things(make: Make) -> None:
    ends = [make(rank, 2) for rank in range(2)]
    for error in together(gathering(ends[0], b"", "init()"), gathering(ends[1], b"", "split()")):
        assert error == "Rank 0 is in init(), rank 1 in split()."


@pytest.mark.parametrize(
    "claims,words",
    [
        ([(1, 3), (1, 3)], "Two processes are rank 1 of 3."),
        ([(1, 4)], "The world has 3 ranks for rank 0 and 4 for rank 1."),
        ([(1, 3), (2, 2)], "The world has 3 ranks for rank 0 and 2 for rank 2."),
        ([(1, 3), (3, 3)], "A process says that it is rank 3 of 3."),
    ],
)
def test_ranks_that_do_not_fit(claims: list[tuple[int, int]], words: str, make: Make) -> None:
    """Everybody who is there learns of it at once; who comes later finds nobody."""
    start = time.monotonic()
    errors = together(gathering(make(0), b""), *(gathering(make(*claim, seconds=3), b"") for claim in claims))
    assert errors[0] == f"{words} Start each rank once, all with one world size."
    assert sum(error == errors[0] for error in errors) >= 2
    assert time.monotonic() - start < 5


def test_another_key(make: Make) -> None:
    """Who has it is told, harms nobody, and is mentioned when a rank is missing."""
    root, good, bad = make(0, seconds=2.0), make(1), make(2, key=b"other" * 8)
    told = together(gathering(root, b""), gathering(good, b""), gathering(bad, b""))
    assert "has another key than rank 2: FLASHMOE_SECRET must be the same on all ranks" in told[2]
    for error in told[:2]:
        assert error.startswith("Rank 2 did not come to init() within 2 s.")
        assert "1 connection(s) with another key were refused: is FLASHMOE_SECRET the same everywhere" in error


def test_a_port_in_use(make: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            CommError, match=f"cannot listen at 127.0.0.1:{port} .*in use. Set MASTER_PORT.*method='torch'"
        ):
            make(0, at=port)
        start = time.monotonic()
        with pytest.raises(CommError, match=r"does not answer as rank 0 of this job does|timed out"):
            make(1, at=port, seconds=1.0).gather(b"", "init()")
        assert time.monotonic() - start < 5


def test_no_address_of_this_machine(make: Make) -> None:
    with pytest.raises(CommError, match="Must be an address of the machine of rank 0"):
        make(0, host="192.0.2.1")  # of no machine: RFC 5737
    for rank in range(2):
        with pytest.raises(CommError, match=r"MASTER_ADDR='no.such.host.invalid' is no name or address"):
            make(rank, host="no.such.host.invalid").gather(b"", "init()")


def test_loopback_stays_loopback(make: Make) -> None:
    make(0)
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    (bound,) = [
        line.split()[1] for line in lines if line.split()[3] == "0A" and line.split()[1].endswith(f":{make.port:04X}")
    ]
    assert bound.startswith("0100007F:")


# ---- Strangers --------------------------------------------------------------------------------------------------------


def silent(port: int) -> None:
    """Many connections that say nothing."""
    for _ in range(40):
        kept.append(socket.create_connection(("127.0.0.1", port)))


def garbage(port: int) -> None:
    for data in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000), channel.GREETING + os.urandom(500)):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            try:
                connection.sendall(data)
                connection.settimeout(0.2)
                connection.recv(1000)
            except OSError:
                pass


def slow(port: int) -> None:
    """A beginning that is right, byte by byte, and then nothing."""
    connection = socket.create_connection(("127.0.0.1", port))
    kept.append(connection)
    for byte in channel.GREETING:
        connection.sendall(bytes([byte]))
        time.sleep(0.01)


def replay(port: int) -> None:
    """An introduction that was right for another challenge."""
    hello = channel.hello()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        channel.receive(connection, channel.HELLO, channel.Deadline(5))
        connection.sendall(channel.introduction(KEY, hello, channel.Claim(2, 3)))
        assert connection.recv(100)[:1] == channel.STRANGER


def forged(port: int) -> None:
    """The claim of an introduction is changed after it was signed."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        hello = channel.receive(connection, channel.HELLO, channel.Deadline(5))
        said = bytearray(channel.introduction(KEY, hello, channel.Claim(1, 3)))
        said[channel.HELLO : channel.HELLO + 8] = struct.pack("<II", 2, 3)
        connection.sendall(said)
        assert connection.recv(100)[:1] == channel.STRANGER


kept: list[socket.socket] = []


@pytest.mark.parametrize("stranger", [silent, garbage, slow, replay, forged])
def test_strangers_harm_nobody(stranger: Callable[[int], None], make: Make) -> None:
    root = make(0)
    waiting = threading.Thread(target=lambda: results.append(root.gather(b"0", "init()")))
    results: list[Any] = []
    waiting.start()
    stranger(make.port)
    assert together(gathering(make(1), b"1"), gathering(make(2), b"2")) == [[b"0", b"1", b"2"]] * 2
    waiting.join()
    assert results == [[b"0", b"1", b"2"]]
    while kept:
        kept.pop().close()


def test_more_strangers_than_there_is_room_for(make: Make, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rendezvous, "_MOST_GUESTS", 8)
    monkeypatch.setattr(rendezvous, "_GREET_S", 0.5)
    test_strangers_harm_nobody(silent, make)


def impostor(listener: socket.socket, answer: bytes) -> None:
    """Listens where rank 0 should, and does not know the key."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(1)
            try:
                connection.sendall(channel.hello())
                channel.receive(connection, channel.INTRODUCTION, channel.Deadline(1))
                connection.sendall(answer)
                connection.recv(1)
            except OSError:
                pass


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("<cQ", channel.WELCOME, 0) + bytes(32),
        struct.pack("<cQ", channel.WELCOME, 1 << 60),
        b"HTTP/1.1 400\r\n\r\n",
        b"",
    ],
    ids=["a welcome", "an endless welcome", "something else", "nothing"],
)
def test_an_impostor_is_not_believed(answer: bytes, make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=impostor, args=(listener, answer), daemon=True).start()
        leaf = make(1, at=listener.getsockname()[1], seconds=1.5)
        with pytest.raises(
            CommError, match=r"Rank 1 did not reach rank 0 .*does not answer as rank 0 of this job does"
        ):
            leaf.gather(b"what only rank 0 may know", "init()")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("change", ["bytes", "kind", "length", "again"])
def test_a_changed_frame_is_refused(change: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = channel.Channel(ours, KEY, b"t", root=True)
        receiver = channel.Channel(theirs, KEY, b"t", root=False)
        deadline = channel.Deadline(2)
        tap, end = socket.socketpair()
        with tap, end:
            sender.connection = end
            sender.send(channel.VALUES, b"value", deadline)
            frame = bytearray(tap.recv(1000))
        if change == "again":
            ours.sendall(frame)
            assert receiver.receive(100, deadline) == (channel.VALUES, b"value")
        else:
            frame[{"bytes": 10, "kind": 0, "length": 1}[change]] ^= 1
        ours.sendall(frame)
        with pytest.raises(ConnectionError):
            receiver.receive(100, deadline)


# ---- Real processes ---------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
import flashmoe_gen as fmg
time.sleep(float(os.environ.get("LATE", "0")))
try:
    with fmg.comm.init() as comm:
        comm.barrier()
        print(comm.rank, comm.world_size, comm.target)
except fmg.FlashMoEError as error:
    print(type(error).__name__, error)
"""
SECRET = {"FLASHMOE_SECRET": "0123456789abcdef"}


def outputs(tmp_path: Path, world_size: int = 2, each: Any = (), **variables: str) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with spawn(world_size, script, each=each, **variables) as ranks:
        return [ended.out.strip() or ended.err for ended in ranks.wait(60)]


def test_processes_meet(tmp_path: Path) -> None:
    """One of them 5 s later, with a secret."""
    late = [{}, {"LATE": "5"}, {}]
    assert outputs(tmp_path, 3, late, **SECRET) == [f"{rank} 3 host" for rank in range(3)]


def test_processes_with_different_secrets(tmp_path: Path) -> None:
    first, second = outputs(tmp_path, each=[SECRET, {}], FLASHMOE_INIT_TIMEOUT_S="3")
    assert first.startswith("CommError Rank 1 did not come to init() within 3 s.") and "another key" in first
    assert second.startswith("CommError What listens at 127.0.0.1") and "FLASHMOE_SECRET must be the same" in second


def test_processes_with_one_rank(tmp_path: Path) -> None:
    """The second rank 0 finds the port in use."""
    told = outputs(tmp_path, each=[{}, {"RANK": "0"}], FLASHMOE_INIT_TIMEOUT_S="3")
    assert sum("in use. Set MASTER_PORT" in line for line in told) == 1
    assert sum("Rank 1 did not come to init()" in line for line in told) == 1


def test_tasks_of_srun(tmp_path: Path) -> None:
    """As srun starts them, without MASTER_ADDR and MASTER_PORT."""
    tasks = [{**SRUN, "SLURM_JOB_ID": str(os.getpid()), "SLURM_PROCID": str(rank)} for rank in range(4)]
    nothing = {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""}
    each = [{**task, **nothing} for task in tasks]
    assert outputs(tmp_path, 4, each) == [f"{rank} 4 host" for rank in range(4)]


def test_the_exports() -> None:
    assert bootstrap.METHODS[0] == "auto" and set(bootstrap._MAKERS) == set(bootstrap.METHODS) - {"auto", "single"}
    assert fmg.comm.init is comm.init
