"""One rank of a job that uses fmg.compat as flashmoe-py's programs do; prints "rank R of N: ok" when all is right.

``FLASHMOE_TARGET=host mpirun -n 2 python tests/processes/compat_worker.py``, also with 3 and 4 ranks.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from flashmoe_program import Place, Program, finish_all

import flashmoe_gen.compat as flashmoe
from flashmoe_gen.errors import CommError, SpecError

BOUNDS = {"BF16": 5e-3, "FP16": 1e-3, "FP32": 1e-3, "FP64": 1e-12}


def check(program: Program) -> None:
    """Run it, and compare y and the counts with the references."""
    args = program.run()
    got, bound = program.place.get(program.moe_out), BOUNDS[program.dtype.name]
    y, counts = program.wanted(routed=True)
    error = np.linalg.norm(got.astype(np.float64) - y) / np.linalg.norm(y)
    assert error < bound, f"{program.init_args}: error {error}"
    judged = program.judged(args).astype(np.float64)
    assert np.linalg.norm(judged - y) < bound * np.linalg.norm(y)
    assert (program.place.get(program.expert_counts) == counts).all()


def quickstart(place: Place) -> None:
    """All ranks, with equal blocks of experts."""
    layers = [Program(place=place), Program("FP16", "VANILLA", "RELU", top_k=1, place=place)]
    for program in (*layers, *layers):  # alternating
        check(program)
    made, world = layers[0].init_args, flashmoe.cb.get_world_size()
    assert (made.ep_world, made.my_pe) == (world, flashmoe.cb.get_rank())
    for program in layers:
        program.finish()


def uneven(place: Place) -> None:
    """All ranks; the first has one expert, the last all others."""
    rank, world = flashmoe.cb.get_rank(), flashmoe.cb.get_world_size()
    owners = [0, *[world - 1] * 7]
    metadata = {
        "ep_world": world, "ep_rank": rank, "my_pe": rank, "rank_map": list(range(world)), "expert_map": owners,
        "num_local_experts": owners.count(rank),
    }  # fmt: skip
    check(Program("FP32", metadata=metadata, place=place))


def groups(place: Place) -> None:
    """Neighbours share experts: data parallel times expert parallel."""
    rank, world = flashmoe.cb.get_rank(), flashmoe.cb.get_world_size()
    first = rank // 2 * 2
    members = [one for one in (first, first + 1) if one < world]
    owners = [expert % len(members) for expert in range(8)]
    metadata = {
        "ep_world": len(members), "ep_rank": rank - first, "my_pe": rank, "rank_map": members, "expert_map": owners,
        "num_local_experts": owners.count(rank - first),
    }  # fmt: skip
    layers = [Program(metadata=metadata, place=place), Program("FP16", "VANILLA", metadata=metadata, place=place)]
    for program in (*layers, *layers):
        check(program)


def wrong_on_one_rank(place: Place) -> None:
    """The last rank passes no address: every rank raises, and the others learn why."""
    program = Program(place=place)
    last = flashmoe.cb.get_world_size() - 1
    program.route()
    flashmoe.cb.sync_all(place.stream_ptr)
    try:
        flashmoe.forward(
            program.flash_handle, program.args(**({"tokens": 0} if flashmoe.cb.get_rank() == last else {}))
        )
        flashmoe.cb.world.joined().check()
    except SpecError as error:
        assert flashmoe.cb.get_rank() == last and "tokens=0 is not valid" in str(error)
    except CommError as error:
        assert flashmoe.cb.get_rank() != last and f"rank {last}" in str(error).lower() and "tokens=0" in str(error), (
            error
        )
    else:
        raise AssertionError("no error")
    with suppress(CommError):  # a rank that leaves now would give the others another reason
        flashmoe.cb.sync_all(place.stream_ptr)


def main(place: Place) -> None:
    flashmoe.cb.initialize()
    rank, world = flashmoe.cb.get_rank(), flashmoe.cb.get_world_size()
    steps = [uneven, groups, quickstart] if world > 1 else [quickstart]
    keep = Program(place=place)  # so that the ranks stay joined in between
    for step in steps:
        step(place)
    check(keep)
    if world > 1:
        wrong_on_one_rank(place)
    finish_all()
    print(f"rank {rank} of {world}: ok", flush=True)


if __name__ == "__main__":
    main(Place())
