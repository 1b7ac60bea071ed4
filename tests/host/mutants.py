"""Planted protocol bugs. Each is a change of the rendered kernel; the explorer must notice every one.

Run as a program with a mutant's name: prints what was wrong and the seed, or "survived". A mutant may crash the process.
"""

from __future__ import annotations

import sys

from scenarios import Scenario, standard

from flashmoe_gen import KernelSource, generate
from flashmoe_gen.cache import Cache
from flashmoe_gen.launch.host import HostKernel

MUTANTS = {
    "dropped release of segments": (
        "if (u64* const word = word_at(i)) store_release<Scope::system>(word, call.word(1));",
        "if (u64* const word = word_at(i)) store_relaxed(word, call.word(1));",
    ),
    "dropped release of token rows": (
        "send_segments(group, call, rows, args.world_size, word_at);",
        "rows(); for (int i = 0; i < args.world_size; ++i) if (word_at(i)) store_relaxed(word_at(i), call.word(1));",
    ),
    "dropped release of returns": ("release.store(word, call.word(1));", "store_relaxed(word, call.word(1));"),
    "dispatch does not wait for lists": (
        "  bool listed = true;\n  if (group.lane == 0) {",
        "  bool listed = true;\n  if (group.lane < 0) {",
    ),
    "rows released to the rank alone": (
        "send_segments(group, call, put, 1, [&](int) { return call.return_word(source, token, slot); });",
        "put(); store_release<Scope::device>(call.return_word(source, token, slot), call.word(1));",
    ),
    "unchecked epoch of words": (
        "[&](u64 epoch) { return epoch == call.epoch; });",
        "[&](u64 epoch) { return epoch != 0; });",
    ),
    "unchecked epoch of chunks": ("+ next) >> 32 == call.epoch;", "+ next) >> 32 != 0;"),
    "reused ring slot": (
        "queue.retired += group.leading(done);",
        "queue.retired = queue.issued[0] + 0 * group.leading(done);",
    ),
    "words not doubled by parity": ("return Call{args, epoch, epoch & 1,", "return Call{args, epoch, 0,"),
    "counters not cleared": ("call.next_set[i] = 0;", "(void)call.next_set;"),
    "unpolled GEMM1 tile": ("if (!wait_part(call, task.serial, u32(begin / kPartColumns))) return false;", ""),
    "part of a GEMM1 tile published as all of it": (
        "task.share == Share::columns ? 1u << task.part : (1u << kCluster) - 1;",
        "(1u << kCluster) - 1;",
    ),
    "early return of rows": (" + parts == kDoneParts;", " == 0;"),
    "idle ranks do not wait for counts": (
        "if (group.lane == 0) here = wait_word(call, Await::counts, u32(source), words);",
        "if (group.lane == 0 && (experts > 0 || source == args.rank)) here = wait_word(call, Await::counts, u32(source), words);",
    ),
}


def mutated(source: KernelSource, name: str) -> HostKernel:
    old, new = MUTANTS[name]
    assert source.text.count(old) == 1, f"{name}: the kernel changed, {old!r} is there {source.text.count(old)} times"
    text = source.text.replace(old, new)
    return HostKernel.load(
        Cache().build(text, name=source.name, arch="host", digest=f"mutant {name}", metadata={"command": "none"})
    )


def hunt(name: str, scenarios: list[Scenario], seeds: int) -> str | None:
    """Explore until the mutant is noticed: a wrong output or a missed deadline."""
    kernels = [
        {
            world.spec.hidden_size: mutated(generate(world.spec, arch="host", tile=world.layers[0].tile), name)
            for world, _ in scenario.worlds
        }
        for scenario in scenarios
    ]
    for seed in range(seeds):
        for number, (scenario, replaced) in enumerate(zip(scenarios, kernels)):
            scenario.run(seed, kernels=replaced)
            if problem := scenario.wrong():
                return f"seed {seed}, scenario {number}: {problem}"
            scenario.reset()
    return None


if __name__ == "__main__":
    print(hunt(sys.argv[1], standard(), seeds=150) or "survived")
