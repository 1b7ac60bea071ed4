"""How the processes that a launcher has started find each other: which launcher it was, and three ways to exchange bytes.

The variables of launchers are read here and nowhere else.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from .. import env
from ..errors import CommError, SpecError, UnsupportedError
from ..spec import MAX_WORLD_SIZE
from .channel import Deadline
from .rendezvous import TcpBootstrap
from .torch_store import TorchBootstrap, initialised, port_number

logger = logging.getLogger("flashmoe_gen")

METHODS = ("auto", "mpi", "torch", "env", "slurm", "single")

Environment = Mapping[str, str]

_MPIRUN = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))  # Hydra (MPICH, Intel), Open MPI
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_PLAIN = ("RANK", "WORLD_SIZE")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on: steps that SLURM makes itself, as for the shell of an allocation
_SLURM_PORTS = range(15000, 32000)  # below those that systems give to clients


class Bootstrap(Protocol):
    """How processes that a launcher has started find each other: used once, when a communicator is made.

    Attributes:
        method: ``"mpi"``, ``"torch"``, ``"env"`` or ``"slurm"``.
        rank: of this process.
        world_size: number of processes.
    """

    method: str
    rank: int
    world_size: int

    def gather(self, value: bytes, what: str) -> list[bytes]:
        """Collective: every rank's bytes, in rank order.

        Raises:
            CommError: not all ranks came before the deadline (``FLASHMOE_INIT_TIMEOUT_S``), or one has failed.
        """

    def close(self) -> None:
        """No more gathers; may be called again."""


class Launch(NamedTuple):
    """What started this process: a rank of a world, and how that is known."""

    method: str
    rank: int
    world_size: int
    how: str


def find(method: str) -> Bootstrap | None:
    """How this process meets the others of its job; ``None``: it is alone.

    Args:
        method: ``"auto"``: what :func:`launched` finds; else as named there.

    Raises:
        SpecError: unknown method, or the variables that it needs are not set, not valid, or contradict each other.
        UnsupportedError: a package is missing, or there are more than 64 processes.
        CommError: MPI's world is not what the launcher started, or rank 0 cannot listen.
    """
    if method not in METHODS:
        raise SpecError(f"method={method!r} is not valid. Must be one of {', '.join(map(repr, METHODS))}.")
    launch = launched(method, os.environ)
    logger.info("comm.init(%r): %s", method, launch.how)
    if launch.world_size > MAX_WORLD_SIZE:
        raise UnsupportedError(f"{launch.how}: more than {MAX_WORLD_SIZE} ranks are not supported.")
    if launch.world_size == 1:
        return None
    return _MAKERS[launch.method](launch)


def launched(method: str, environ: Environment) -> Launch:
    """Which launcher started this process, from what it left in the environment.

    ``"auto"`` takes the first of these, for an inner launcher hides the one that started it: a torch.distributed that is
    initialised; torchrun; mpirun; srun; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, all four; and prterun, or what else gives
    PMIx's variables, which have no size, so that MPI is asked. What ``mpirun`` or ``srun`` say of one process gives way to those
    four, so that a program may start ranks in a shell on a cluster; of several processes it must agree with them. A rank without a
    world, or a world without a rank, is left over from something else and does not count.
    """
    if method == "single":
        return Launch("single", 0, 1, "a single process, as asked")
    if method == "mpi":
        return _of_mpi()
    if method == "torch":
        return _initialised_torch() or _plain("torch", environ, "method='torch', without an initialised group,")
    if method == "env":
        if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise SpecError("method='env': torchrun itself listens at MASTER_PORT. Use method='torch'.")
        return _plain("env", environ, "method='env'")
    if method == "slurm":
        found = _srun(environ)
        if found is None:
            why = _stray(environ) or "SLURM_STEP_ID is not set"
            raise SpecError(f"method='slurm': this process is no task of srun ({why}).")
        return found
    return _automatic(environ)


def _automatic(environ: Environment) -> Launch:
    if torch := _initialised_torch():
        return torch
    if "TORCHELASTIC_RUN_ID" in environ and _both(environ, _PLAIN):
        return _plain("torch", environ, "torchrun")._replace(how=_how("torchrun", environ, _PLAIN))
    outer = _mpirun(environ) or _srun(environ)
    if _both(environ, _PLAIN):
        complete = all(environ.get(name) for name in _MASTER)
        if outer is None and (complete or _number(environ, "WORLD_SIZE") > 1):
            return _plain("env", environ, "RANK and WORLD_SIZE")
        if outer is not None and complete:
            plain = _plain("env", environ, "RANK and WORLD_SIZE")
            if outer.world_size == 1:
                return plain
            if outer[1:3] != plain[1:3]:
                raise SpecError(
                    f"Two launchers contradict each other: {outer.how}, and {plain.how}. Say which one counts: "
                    f"comm.init({outer.method!r}) or comm.init('env')."
                )
    if outer is not None:
        return outer
    if _pmix(environ):
        return _of_mpi()
    stray = _stray(environ)
    return Launch("single", 0, 1, f"a single process ({stray or 'no launcher has left its variables'})")


# ---- Variables --------------------------------------------------------------------------------------------------------


def _both(environ: Environment, names: tuple[str, str]) -> bool:
    return all(environ.get(name, "").strip() for name in names)


def _number(environ: Environment, name: str) -> int:
    text = environ[name].strip()
    if not re.fullmatch("[0-9]{1,10}", text):
        raise SpecError(f"{name}={text!r} is not valid. Must be a whole number.")
    return int(text)


def _how(launcher: str, environ: Environment, names: tuple[str, str]) -> str:
    rank, world_size = names
    return f"{launcher} says rank {environ[rank].strip()} of {environ[world_size].strip()} ({rank}, {world_size})"


def _launch(method: str, launcher: str, environ: Environment, names: tuple[str, str]) -> Launch:
    rank, world_size = (_number(environ, name) for name in names)
    if rank >= world_size:
        raise SpecError(f"{names[0]}={rank} is not valid with {names[1]}={world_size}. Must be less.")
    return Launch(method, rank, world_size, _how(launcher, environ, names))


def _plain(method: str, environ: Environment, who: str) -> Launch:
    missing = [name for name in (*_PLAIN, *_MASTER) if not environ.get(name, "").strip()]
    if missing and not (missing == list(_MASTER) and environ["WORLD_SIZE"].strip() == "1"):
        raise SpecError(f"{who} needs {', '.join((*_PLAIN, *_MASTER))}; not set: {', '.join(missing)}.")
    return _launch(method, "the environment", environ, _PLAIN)


def _mpirun(environ: Environment) -> Launch | None:
    srun = _srun(environ)
    for names in _MPIRUN:
        if _both(environ, names):
            found = _launch("mpi", "mpirun", environ, names)
            # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too; only mpirun tells which of them are on this machine.
            if srun is None or srun[1:3] != found[1:3] or "MPI_LOCALNRANKS" in environ or names != _MPIRUN[0]:
                return found
    return None


def _srun(environ: Environment) -> Launch | None:
    """A task of srun: not the script of a job, nor the shell of an allocation."""
    if not _both(environ, _SRUN) or not environ.get("SLURM_STEP_ID", "").strip():
        return None
    if _number(environ, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        return None
    return _launch("slurm", "srun", environ, _SRUN)


def _pmix(environ: Environment) -> str:
    """The rank that a launcher of PMIx gave; ``""``: none. SLURM's own says how many there are in other variables."""
    job = environ.get("PMIX_NAMESPACE", "")
    return environ.get("PMIX_RANK", "") if job and not job.startswith("slurm.") else ""


def _stray(environ: Environment) -> str:
    """What looks like a launcher and is none."""
    for rank, world_size in (_PLAIN, *_MPIRUN):
        for there, absent in ((world_size, rank), (rank, world_size)):
            if environ.get(there) and not environ.get(absent):
                return f"{there}={environ[there]} does not count without {absent}"
    if "SLURM_JOB_ID" in environ:
        return f"in job {environ['SLURM_JOB_ID']} of SLURM, but not a task of srun"
    return ""


# ---- MPI --------------------------------------------------------------------------------------------------------------


def _mpi() -> Any:
    """MPI, initialised. That waits for every process of the job, without a deadline: MPI has none for it."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it found no library of an MPI
        raise UnsupportedError(
            f"method='mpi' needs mpi4py and the library of an MPI ({error}): `pip install mpi4py`, and `pip install mpich` if "
            "there is no MPI."
        ) from error
    if MPI.Is_finalized():
        raise CommError("MPI was finalised in this process. Make the communicator before.")
    if not MPI.Is_initialized():
        MPI.Init_thread()
        atexit.register(lambda: None if MPI.Is_finalized() else MPI.Finalize())
    return MPI


def _of_mpi() -> Launch:
    MPI = _mpi()  # noqa: N806
    rank, world_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    library = " ".join(re.split("[,\n\0]", MPI.Get_library_version())[0].split())
    launchers = [_launch("mpi", "mpirun", os.environ, names) for names in _MPIRUN if _both(os.environ, names)]
    launchers = launchers or [launch for launch in [_srun(os.environ)] if launch]
    if launchers and (rank, world_size) not in [launch[1:3] for launch in launchers]:
        raise CommError(
            f"{launchers[0].how}, but MPI's library, {library}, says rank {rank} of {world_size}: it is not the MPI of this "
            "launcher. Start with the mpirun of that library, or install mpi4py for the MPI of this mpirun."
        )
    if not launchers and _pmix(os.environ) not in ("", str(rank)):
        raise CommError(
            f"The launcher says rank {_pmix(os.environ)} (PMIX_RANK), but MPI's library, {library}, says rank {rank} of "
            f"{world_size}: it does not know PMIx. Start with the mpirun of that library."
        )
    return Launch("mpi", rank, world_size, f"MPI ({library}) says rank {rank} of {world_size}")


class MpiBootstrap:
    """See :class:`Bootstrap`: collectives of MPI's COMM_WORLD, which the user's own must not interleave with."""

    method = "mpi"
    _unfinished: list[Any] = []  # noqa: RUF012  # MPI may still write to them

    def __init__(self, seconds: float) -> None:
        _, self.rank, self.world_size, _ = _of_mpi()
        self._mpi, self._seconds = _mpi(), seconds
        self._world = self._mpi.COMM_WORLD

    def gather(self, value: bytes, what: str) -> list[bytes]:
        deadline = Deadline(self._seconds)
        lengths = bytearray(8 * self.world_size)
        own = len(value).to_bytes(8, sys.byteorder)
        self._finish(self._world.Iallgather, own, lengths, what, deadline)
        counts = list(memoryview(lengths).cast("Q"))
        starts = list(itertools.accumulate(counts, initial=0))
        values = bytearray(starts[-1])
        into = [values, counts, starts[:-1], self._mpi.BYTE]
        self._finish(self._world.Iallgatherv, [value, self._mpi.BYTE], into, what, deadline)
        return [bytes(values[start : start + count]) for start, count in zip(starts, counts)]

    def _finish(self, begin: Callable[..., Any], mine: Any, into: Any, what: str, deadline: Deadline) -> None:
        try:
            request, pause = begin(mine, into), 1e-6
            while not request.Test():
                time.sleep(deadline.within(pause))
                pause = min(2 * pause, 0.01)
        except TimeoutError:
            self._unfinished += [request, mine, into]
            raise CommError(
                f"Not all {self.world_size} ranks of MPI came to {what} within {deadline.seconds:g} s (this is rank {self.rank}). "
                "FLASHMOE_INIT_TIMEOUT_S sets the limit."
            ) from None
        except self._mpi.Exception as error:
            raise CommError(f"{what}: MPI failed on rank {self.rank}: {error}") from error

    def close(self) -> None:
        pass


def _initialised_torch() -> Launch | None:
    distributed = initialised()
    if distributed is None:
        return None
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    how = f"torch.distributed ({distributed.get_backend()}) says rank {rank} of {world_size}"
    return Launch("torch", rank, world_size, how)


def job_key(*facts: str) -> bytes:
    """What the processes of a job know: ``FLASHMOE_SECRET``, and what tells the job from others.

    Without ``FLASHMOE_SECRET`` it keeps out other jobs and whatever else connects by mistake, but nobody who has found out the
    user's number and the facts.
    """
    parts = "\0".join(["flashmoe_gen", str(os.getuid()), *facts])
    return hmac.new(env.secret() or b"", parts.encode(), hashlib.sha256).digest()


def _by_environment(launch: Launch) -> Bootstrap:
    host, port = (os.environ[name].strip() for name in _MASTER)
    _, rank, world_size, _ = launch
    key = job_key(port)
    return TcpBootstrap("env", rank, world_size, host, port_number(port), key, env.init_timeout_s())


def _by_slurm(launch: Launch) -> Bootstrap:
    job = os.environ.get("SLURM_JOB_ID", ""), os.environ["SLURM_STEP_ID"]
    host, port = slurm_master(os.environ)
    _, rank, world_size, _ = launch
    return TcpBootstrap("slurm", rank, world_size, host, port, job_key(*job), env.init_timeout_s())


def slurm_master(environ: Environment) -> tuple[str, int]:
    """Where rank 0 of a step listens: MASTER_ADDR and MASTER_PORT, else its first node (loopback if there is no other) and a port
    that belongs to the step."""
    alone = environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
    first = "127.0.0.1" if alone else first_node(environ.get("SLURM_STEP_NODELIST", ""))
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    number = int.from_bytes(hashlib.sha256(step.encode()).digest()[:4], "big")
    own = str(_SLURM_PORTS[number % len(_SLURM_PORTS)])
    return environ.get("MASTER_ADDR", "").strip() or first, port_number(environ.get("MASTER_PORT", "").strip() or own)


def first_node(nodes: str) -> str:
    """The first name of a list as SLURM writes it, ``node[07-12,20],other``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise SpecError(f"SLURM_STEP_NODELIST={nodes!r} is not a list of nodes. Set MASTER_ADDR.")
    return "".join(part or "" for part in found.groups())


_MAKERS: dict[str, Callable[[Launch], Bootstrap]] = {
    "mpi": lambda launch: MpiBootstrap(env.init_timeout_s()),
    "torch": lambda launch: TorchBootstrap(launch.rank, launch.world_size, env.init_timeout_s()),
    "env": _by_environment,
    "slurm": _by_slurm,
}
