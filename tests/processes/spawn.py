"""Start real processes, as launchers do, and never leave one behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LAUNCHERS = (
    "PMI",
    "OMPI_",
    "MPI_LOCAL",
    "HYD",
    "PRTE_",
    "SLURM_",
    "TORCHELASTIC_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
)


class Ended(NamedTuple):
    """What a process left. A negative code is a signal."""

    code: int
    out: str
    err: str


def environment(**variables: str | None) -> dict[str, str]:
    """This process's, on the host target and without what launchers leave; ``None`` removes a variable."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    made = {**plain, "PYTHONPATH": path, "FLASHMOE_TARGET": "host", "RANK": None, "WORLD_SIZE": None, **variables}
    made["PYTHONUNBUFFERED"] = None  # with it a line is written in pieces, between which another rank's may come
    return {name: value for name, value in made.items() if value is not None}


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_group(group: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


class Spawned:
    """Processes that run beside the test, each in a process group of its own, which ends with the block.

    Args:
        commands: of each process.
        environments: of each process.
    """

    def __init__(self, commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="flashmoe_gen-spawned-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for number, (command, variables) in enumerate(zip(commands, environments)):
                with self._file(number, "out").open("wb") as out, self._file(number, "err").open("wb") as err:
                    words = [str(word) for word in command]
                    self.processes.append(
                        subprocess.Popen(
                            words,
                            env=variables,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.end()
            raise

    def _file(self, number: int, kind: str) -> Path:
        return self._folder / f"{number}.{kind}"

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def said(self, number: int) -> str:
        """What a process has printed so far."""
        return self._file(number, "out").read_text(errors="replace")

    def await_text(self, text: str, numbers: Sequence[int] | None = None, seconds: float = 60) -> None:
        """Wait until each of these processes has printed a text."""
        end = time.monotonic() + seconds
        for number in range(len(self.processes)) if numbers is None else numbers:
            while text not in self.said(number):
                code = self.processes[number].poll()
                error = self._file(number, "err").read_text(errors="replace")
                assert code is None and time.monotonic() < end, (
                    f"process {number} ({code}) did not say {text}:\n{error}"
                )
                time.sleep(0.005)

    def kill(self, number: int) -> None:
        """SIGKILL one process."""
        self.processes[number].kill()

    def wait(self, seconds: float = 120) -> list[Ended]:
        """What all left, once they have ended.

        Raises:
            AssertionError: one of them has not; with what all said so far.
        """
        end = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            for process in self.processes:
                process.wait(max(0.0, end - time.monotonic()))
        late = [number for number, process in enumerate(self.processes) if process.returncode is None]
        left = [
            Ended(
                -signal.SIGALRM if process.returncode is None else process.returncode,
                self.said(number),
                self._file(number, "err").read_text(errors="replace"),
            )
            for number, process in enumerate(self.processes)
        ]
        assert not late, f"processes {late} have not ended after {seconds:g} s: {left}"
        return left

    def leftovers(self) -> list[int]:
        """Processes that those which have ended left running."""
        return [pid for process in self.processes if process.poll() is not None for pid in of_group(process.pid)]

    def end(self) -> None:
        """Kill what still runs, and remove what was printed."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def spawn(
    world_size: int, script: Path, *words: object, each: Sequence[Mapping[str, str]] = (), **variables: str
) -> Spawned:
    """Ranks of a script that find each other through RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        world_size: number of processes.
        script: that each runs.
        words: arguments of the script.
        each: more variables of each rank.
        variables: more variables of all ranks.
    """
    port = str(free_port())
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(world_size)} for rank in range(world_size)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    environments = [
        environment(**{**common, **ranks[rank], **(each[rank] if each else {})}) for rank in range(world_size)
    ]
    return Spawned([[sys.executable, script, *words]] * world_size, environments)


def launch(command: Sequence[object], seconds: float = 120, **variables: str) -> Ended:
    """Run a launcher to its end."""
    with Spawned([command], [environment(**variables)]) as spawned:
        return spawned.wait(seconds)[0]
