"""Start real processes that form a group, without a launcher: they find each other through files.

A rank runs functions of a test's own module, one after the other; what they return comes back as JSON.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

import flashmoe_gen as fmg  # noqa: E402
from flashmoe_gen.comm import processes  # noqa: E402


class FileBootstrap:
    """See :class:`flashmoe_gen.comm.bootstrap.Bootstrap`."""

    method = "env"

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._folder, self._gathers = folder, 0

    def gather(self, value: bytes, what: str) -> list[bytes]:
        self._gathers += 1
        paths = [self._folder / f"{self._gathers}.{rank}" for rank in range(self.world_size)]
        new = self._folder / f"{self._gathers}.{self.rank}.new"
        new.write_bytes(value)
        new.rename(paths[self.rank])
        end = time.monotonic() + 60
        while not all(path.exists() for path in paths):
            assert time.monotonic() < end, f"{what}: not all came"
            time.sleep(0.005)
        return [path.read_bytes() for path in paths]

    def close(self) -> None:
        pass


class Group:
    """Processes of one test.

    Args:
        folder: for the files through which they find each other.
        module: of the test: ``__name__``.
        work: names of its functions that the ranks run, between blanks.
        world_size: number of ranks.
        args: for the functions.
        each: environment variables of each rank; ``None``: nothing beside those of all.
        variables: environment variables of all ranks.
    """

    def __init__(
        self,
        folder: Path,
        module: str,
        work: str,
        world_size: int,
        *args: Any,
        each: list[dict[str, str]] | None = None,
        **variables: str,
    ) -> None:
        root = str(HERE.parent.parent)
        self.folder = folder
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE / "group.py"), module, work, str(folder), json.dumps(args)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "FLASHMOE_TARGET": "host",
                    **variables,
                    **(each[rank] if each else {}),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]

    def results(self, *, without: tuple[int, ...] = (), timeout: float = 100) -> list[Any]:
        """What each rank returned, for several functions a dict by name, after waiting for all; ``None`` for ranks that were
        killed."""
        found: list[Any] = []
        try:
            for rank, process in enumerate(self.ranks):
                out, err = process.communicate(timeout=timeout)
                if rank not in without:
                    assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{out}\n{err}"
                results = {} if rank in without else json.loads(out.splitlines()[-1])
                found.append(None if not results else results if len(results) > 1 else next(iter(results.values())))
        finally:
            for process in self.ranks:
                process.kill()
                process.wait()
        return found

    def await_file(self, name: str, timeout: float = 60) -> None:
        """Wait until a rank has called :func:`say`."""
        end = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < end and all(p.poll() in (None, 0) for p in self.ranks), f"no {name}"
            time.sleep(0.005)


def say(name: str) -> None:
    """In a rank: let the test go on."""
    (Path(sys.argv[3]) / name).touch()


def error_of(work: Any) -> str:
    """Type and text of what it raises; ``""``: nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


_joined = itertools.count()


def join(heap_bytes: int | None = None) -> fmg.comm.Communicator:
    """In a rank: a communicator of all."""
    folder = Path(sys.argv[3]) / str(next(_joined))
    folder.mkdir(exist_ok=True)
    bootstrap = FileBootstrap(folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return fmg.comm.Communicator(processes.join(bootstrap, target=None, device=None, heap_bytes=heap_bytes))


def main() -> None:
    _, module, work, _, args = sys.argv
    sys.modules["group"] = sys.modules["__main__"]
    functions = importlib.import_module(module)
    results = {}
    for name in work.split():
        start = time.monotonic()
        results[name] = getattr(functions, name)(*json.loads(args))
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
