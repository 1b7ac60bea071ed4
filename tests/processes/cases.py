"""A rank of a job that runs many cases on the host target, and writes what each came to.

``LAUNCHER python cases.py FOLDER CASE...``: rank R writes FOLDER/R.json: {case: "" or what was wrong}. Every y must have the bits
of one rank that has all experts, and be as near to the float64 reference as its dtype allows.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent / "host")]

from world import BOUNDS, Problem, bits, poison, relative_error, routes  # noqa: E402

import flashmoe_gen as fmg  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32", "float64")
KINDS = ("uniform", "skewed", "one", "few", "masked", "none")
COUNTS = (64, 0, 17, 1)  # tokens; rank r begins with the r-th
MANY = 1000


def spec_of(world_size: int, dtype: str = "float32", **fields: object) -> fmg.MoESpec:
    fields = {"dtype": dtype, "max_tokens": 64, "world_size": world_size, **fields}
    return fmg.MoESpec(64, 48, 8, 2, **fields)  # type: ignore[arg-type]


class Ranked:
    """A layer of this rank beside one that has all experts."""

    def __init__(self, comm: fmg.comm.Communicator, spec: fmg.MoESpec, placement: fmg.Placement | None = None) -> None:
        self.layer = fmg.MoELayer(spec, comm=comm, placement=placement)
        self.alone = fmg.MoELayer(spec.replace(world_size=1), comm=fmg.comm.init("single", target="host"))
        self.problem = Problem(spec)
        self.experts = self.problem.experts(self.layer.placement.local_experts(comm.rank))
        self.all_experts = self.problem.experts(range(spec.num_experts))

    def check(self, count: int, kind: str, seed: int) -> None:
        """One call, every buffer poisoned before."""
        x, (ids, weights) = self.problem.tokens(count, seed), routes(self.layer.spec, count, kind, seed)
        poison(self.layer, heap=False)  # peers may write already
        out = np.full_like(x, np.nan)
        y = self.layer(x, ids, weights, self.experts, out=out)
        assert bits(y) == bits(self.alone(x, ids, weights, self.all_experts)), f"{count} tokens, {kind}: other bits"
        error = relative_error(y, self.problem.reference(x, ids, weights))
        assert error <= BOUNDS[self.layer.spec.dtype], f"{count} tokens, {kind}: error {error}"

    def close(self) -> None:
        self.layer.close()
        self.alone.close()


def matrix(comm: fmg.comm.Communicator, spec: fmg.MoESpec, placement: fmg.Placement | None = None) -> None:
    """Every kind of routing, with uneven and with no tokens."""
    ranked = Ranked(comm, spec, placement)
    for number, kind in enumerate(KINDS):
        for turn in range(2):
            ranked.check(COUNTS[(comm.rank + number + turn) % len(COUNTS)], kind, 100 * comm.rank + 10 * number + turn)
    ranked.check(0, "uniform", 0)  # nobody has tokens
    ranked.close()


def few_experts(comm: fmg.comm.Communicator) -> None:
    """One rank has no experts, one has most, and no rank has them in order."""
    slots = [[] for _ in range(comm.world_size)]
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    slots[0], slots[-1] = order[:2], order[2:]
    if comm.world_size == 2:
        slots = [order, []]
    matrix(comm, spec_of(comm.world_size), fmg.Placement(slots))


def many_calls(comm: fmg.comm.Communicator) -> None:
    """Calls whose counts change, of two layers in turn; a rank lags now and then."""
    spec, rng = spec_of(comm.world_size), np.random.default_rng(comm.rank)
    ranked = [Ranked(comm, spec), Ranked(comm, spec)]
    x, (ids, weights) = ranked[0].problem.tokens(64, comm.rank), routes(spec, 64, "skewed", comm.rank)
    want = ranked[0].alone(x, ids, weights, ranked[0].all_experts)
    for number in range(MANY):
        count, each = int(rng.integers(65)), ranked[number % 2]
        y = each.layer(x[:count], ids[:count], weights[:count], each.experts)
        assert bits(y) == bits(want[:count]), f"call {number}, {count} tokens: other bits"
    for each in ranked:
        each.close()


CASES = {dtype: lambda comm, dtype=dtype: matrix(comm, spec_of(comm.world_size, dtype)) for dtype in DTYPES}
CASES |= {"few_experts": few_experts, "many_calls": many_calls}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    with fmg.comm.init() as comm:
        comm.reserve(*(spec_of(comm.world_size, dtype) for dtype in DTYPES))
        results = {}
        for name in names:
            try:
                CASES[name](comm)
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
                break  # the others wait for this rank, and cannot go on
        (folder / f"{comm.rank}.json").write_text(json.dumps({"world_size": comm.world_size, **results}))
        if any(results.values()):
            comm.close(abort=True)


if __name__ == "__main__":
    main()
