"""Run examples/expert_parallel.py as SLURM starts it, on one node, and write what came out: `python tuning/slurm.py OUT.json`.

Needs srun, salloc and sbatch, a partition with one idle node, and mpirun and torchrun. Names of nodes are left out.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = """import logging, runpy
logging.basicConfig(level=logging.INFO, format="%(message)s")
runpy.run_path("examples/expert_parallel.py", run_name="__main__")
"""
RUNS = {
    "one task": "srun -n 1 python {program}",
    "four tasks": "srun -n 4 --overcommit python {program}",
    "four tasks with PMI": "srun -n 4 --overcommit --mpi=pmi2 python {program}",
    "a shell of salloc": "salloc -n 2 python {program}",
    "the script of a job": "sbatch -W -n 2 -o {output} --wrap 'python {program}'",
    "four tasks of a job's script": "sbatch -W -n 2 -o {output} --wrap 'srun -n 4 --overcommit python {program}'",
    "mpirun in salloc": "salloc -n 2 mpirun -n 2 python {program}",
    "torchrun in a task": "srun -n 1 torchrun --standalone --nproc_per_node=2 {program}",
}


def said(command: str) -> str:
    """The output of a command that works."""
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def run(command: str, folder: Path) -> dict[str, Any]:
    """Its exit code, the line of the example, and what each rank found."""
    names = {"program": folder / "program.py", "output": folder / "output"}
    names["program"].write_text(PROGRAM)
    variables = {**os.environ, "FLASHMOE_TARGET": "host", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command.format(**names),
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=variables,
        timeout=300,
    )
    text = done.stdout + done.stderr + (names["output"].read_text() if "{output}" in command else "")
    lines = text.replace(socket.gethostname(), "NODE").splitlines()
    return {
        "command": command.replace("-o {output} ", "").format(program="examples/expert_parallel.py"),
        "code": done.returncode,
        "printed": [line for line in lines if "rank(s) on" in line],
        "found": sorted(line for line in lines if line.startswith("comm.init(")),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(command, Path(folder)) for name, command in RUNS.items()}
    version = re.sub(r"\s+", " ", said("mpirun --version")).split(" Release")[0]
    found = {
        "commit": said("git rev-parse HEAD"),
        "changed": bool(said("git status --porcelain --untracked-files=no")),
        "slurm": said("srun --version"),
        "mpirun": version,
        "python": sys.version.split()[0],
        "nodes": 1,
        "cores": os.cpu_count(),
        "runs": runs,
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    for name, each in runs.items():
        print(f"{name}: {each['code']} {each['printed']} {each['found'][:1]}")


if __name__ == "__main__":
    main()
