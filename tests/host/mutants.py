"""Planted protocol bugs. Each is a change of the rendered kernel; the explorer must notice every one.

Run as a program with a mutant's name: prints what was wrong and the seed, or "survived". A mutant may crash the process.
"""

from __future__ import annotations

import sys

from aborts import CHECKS
from scenarios import Scenario, standard

from flashmoe_gen import KernelSource, generate
from flashmoe_gen.cache import Cache
from flashmoe_gen.launch.host import HostKernel

MUTANTS = {
    "dropped release of segments": (
        "if (u64* const word = word_at(i)) store_release<Scope::system>(word, call.word(value));",
        "if (u64* const word = word_at(i)) store_relaxed(word, call.word(value));",
    ),
    "dropped release of token rows": (
        "send_segments(group, call, rows, args.world_size, word_at);",
        "rows(); for (int i = 0; i < args.world_size; ++i) if (word_at(i)) store_relaxed(word_at(i), call.word(1));",
    ),
    "dropped release of lists": (
        "send_segments(group, call, lists, args.world_size, word_at);",
        "lists(); for (int i = 0; i < args.world_size; ++i) if (word_at(i)) store_relaxed(word_at(i), call.word(1));",
    ),
    "dropped release of returns": ("release.store(word, call.word(value));", "store_relaxed(word, call.word(value));"),
    "rows taken for the list": ("(list >> 32 == call.epoch || chunks == 0)", "(list >> 32 == call.epoch || chunks != 0)"),
    "list complete too early": (
        "fetch_add_acq_rel(&call.counters().list_sent[owner], count) + count == all;",
        "fetch_add_acq_rel(&call.counters().list_sent[owner], count) == 0;",
    ),
    "sums taken for rows": ("if (what == kSumIsBack) (first", "if (what == 77) (first"),
    "pool places of another source": (
        "return Pooled{args.pool_first[row.source] + summand.first,",
        "return Pooled{summand.first,",
    ),
    "counters of another layer not cleared": (
        "scratch->used[calls & 1] = u32(call.args.set_words);",
        "scratch->used[calls & 1] = u32(sizeof(Counters) / 4);",
    ),
    "epoch that becomes 0": ("return epoch == 0xffffffffu ? 2 : epoch + 1;", "return epoch + 1;"),
    "dispatch does not wait for lists": (
        "  bool listed = true;\n  if (group.lane == 0) {",
        "  bool listed = true;\n  if (group.lane < 0) {",
    ),
    "rows released to the rank alone": (
        "send_segments(group, call, put, 1, [&](int) { return call.return_word(source, token, slot); }, kSumIsBack);",
        "put(); store_release<Scope::device>(call.return_word(source, token, slot), call.word(kSumIsBack));",
    ),
    "unchecked epoch of words": (
        "(word)) >> 32; },\n      [&](u64 epoch) { return epoch == call.epoch; });",
        "(word)) >> 32; },\n      [&](u64 epoch) { return epoch != 0; });",
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
        "    const u64* words = call.count_words(args.rank, source);\n    u64 tag = 0;",
        "    const u64* words = call.count_words(args.rank, source);\n    u64 tag = 0;\n"
        "    if (args.local_experts == 0 && source != args.rank) continue;",
    ),
}


# Bugs that show in how a call fails: the check of aborts.py that notices each.
OF_ABORTS = {
    "unchecked tag": ("different calls", "if (!alike || u32(tag) == args.tag) continue;", "if (!alike || tag != 0) continue;"),
    "peers are not told": ("peers of a rank that gives up", "    if (failed) share_failure(call);\n", ""),
    "unnoticed launch": ("launches at once", "party.group.lane == 0 && !is_alone(call, found);", "false;"),
}
MUTANTS |= {name: texts for name, (_, *texts) in OF_ABORTS.items()}


def mutated(source: KernelSource, name: str) -> HostKernel:
    old, new = MUTANTS[name]
    assert source.text.count(old) == 1, f"{name}: the kernel changed, {old!r} is there {source.text.count(old)} times"
    text = source.text.replace(old, new)
    return HostKernel.load(
        Cache().build(text, name=source.name, arch="host", digest=f"mutant {name}", metadata={"command": "none"})
    )


def mutants_of(scenario: Scenario, name: str) -> dict[int, HostKernel]:
    """By hidden size."""
    return {
        world.spec.hidden_size: mutated(generate(world.spec, arch="host", tile=world.layers[0].tile), name)
        for world, _ in scenario.worlds
    }


def hunt(name: str, scenarios: list[Scenario], seeds: int) -> str | None:
    """Explore until the mutant is noticed: a wrong output, a missed deadline, or another failure than there should be."""
    if name in OF_ABORTS:
        problem = CHECKS[OF_ABORTS[name][0]](lambda scenario: mutants_of(scenario, name))
        return problem and f"seed: {problem}"
    kernels = [mutants_of(scenario, name) for scenario in scenarios]
    for seed in range(seeds):
        for number, (scenario, replaced) in enumerate(zip(scenarios, kernels)):
            scenario.run(seed, kernels=replaced)
            if problem := scenario.wrong():
                return f"seed {seed}, scenario {number}: {problem}"
            scenario.reset()
    return None


if __name__ == "__main__":
    print(hunt(sys.argv[1], standard(), seeds=150) or "survived")
