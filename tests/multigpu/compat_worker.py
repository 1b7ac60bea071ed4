"""One rank of a job that uses fmg.compat, with a GPU of its own: ``mpirun -n 2 python tests/multigpu/compat_worker.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashmoe_program import Device
from processes.compat_worker import main

import flashmoe_gen.compat as flashmoe

if __name__ == "__main__":
    main(Device(flashmoe.get_local_rank()))
