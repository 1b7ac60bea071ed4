"""What a ticket stands for, against a model that writes every task down: host code of the kernel, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_gen as fmg
from flashmoe_gen.args import READY_BLOCK
from flashmoe_gen.cache import Cache
from flashmoe_gen.launch.host import load_library

BLOCK_M, HIDDEN, INTERMEDIATE = 4, 24, 40  # GEMM1 has 5 tiles, GEMM2 3: of a cluster of two, one has none at the end
TILES = (5, 3, 2)  # the third phase is one that only the queue knows
WAITING, TASK, CLOSED = range(3)
IS_CLOSED = 1 << 63
POSITION = np.dtype([(name, "u4") for name in ("found", "entry", "kind", "column", "block")])
SHARE = np.dtype([(name, "u4") for name in ("column", "part", "parts", "serial", "expert_slot", "first_row", "rows")])
PROBE = """
struct Probe { u32 column, part, parts, serial, expert_slot, first_row, rows; };
extern "C" void probe(u32 ticket, u64 queue, const ReadyBlock* entries, Position* at, Probe* shares) {
  *at = decode(ticket, queue);
  if (at->found != Found::task) return;
  const Task task = task_at(*at, entries[kNumPhases * at->entry + u32(at->kind)]);
  for (u32 member = 0; member < kCluster; ++member) {
    const Task share = share_of(task, member);
    const bool split = share.share == Share::columns;
    shares[member] = Probe{share.column, split ? share.part : 0u, split ? 1u : u32(kCluster), share.serial,
                           share.block.expert_slot, share.block.first_row, task.block.rows == 0 ? 0 : share.block.rows};
  }
}
extern "C" u64 word(u32 entries, u32 panel, bool closed) { return queue_word(entries, panel, closed); }
"""


@functools.lru_cache
def library(cluster: int, phases: int) -> ctypes.CDLL:
    spec = fmg.MoESpec(HIDDEN, INTERMEDIATE, 4, 2, dtype="float32", max_tokens=8)
    tile = fmg.TileConfig(block_m=BLOCK_M, block_n=8, cluster=cluster)
    source = fmg.generate(spec, arch="host", tile=tile)
    text = source.text
    if phases == 3:
        for at, more in (("  closed,\n", "  third,\n  closed,\n"), ("  // gemm2\n", "\n    {2, 8, 16, 24},\n")):
            assert text.count(at) == 1
            text = text.replace(at, more)
    text += PROBE
    digest = hashlib.sha256(text.encode()).hexdigest()
    made = load_library(Cache().build(text, name=source.name, arch="host", digest=digest, metadata={"command": "none"}).path)
    made.probe.argtypes = [ctypes.c_uint32, ctypes.c_uint64, *[ctypes.c_void_p] * 3]
    made.probe.restype = None
    made.word.argtypes, made.word.restype = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_bool], ctypes.c_uint64
    return made


def ask(cluster: int, phases: int, ticket: int, queue: int, entries: np.ndarray) -> tuple[np.void, np.ndarray]:
    at, shares = np.zeros(1, POSITION), np.zeros(cluster, SHARE)
    library(cluster, phases).probe(ticket, queue, entries.ctypes.data, at.ctypes.data, shares.ctypes.data)
    return at[0], shares


def positions(panel: int, cluster: int, entries: int, phases: int) -> list[tuple[int, int, int, int]]:
    """(entry, phase, column, first M-block) of every ticket, in order."""
    return [
        (entry, phase, column, block)
        for entry in range(entries)
        for phase, tiles in enumerate(TILES[:phases])
        for column in range(tiles)
        for block in range(0, panel, cluster)
    ]


@st.composite
def queues(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]]]:
    """Cluster, phases, M-blocks of a full panel, and the rows of each entry's panels."""
    cluster, phases = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 3]))
    panel = cluster * draw(st.integers(1, 4))
    rows = st.integers(0, panel * BLOCK_M)
    return cluster, phases, panel, draw(st.lists(st.lists(rows, min_size=phases, max_size=phases), min_size=1, max_size=4))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(queue=queues(), first_row=st.sampled_from([0, 12]))
def test_every_tile_of_every_row_is_handed_out_once(queue: tuple[int, int, int, list[list[int]]], first_row: int) -> None:
    cluster, phases, panel, heights = queue
    entries = np.zeros(phases * len(heights), READY_BLOCK.dtype)
    every = [rows for entry in heights for rows in entry]
    for number, rows in enumerate(every):
        entries[number] = (number, first_row, rows, 100 * number)
    word = library(cluster, phases).word(len(heights), panel, True)
    expected = positions(panel, cluster, len(heights), phases)
    covered = [np.zeros((rows, TILES[n % phases] * cluster), int) for n, rows in enumerate(every)]
    serials: list[dict[int, int]] = [{} for _ in covered]
    for ticket, want in enumerate(expected):
        at, shares = ask(cluster, phases, ticket, word, entries)
        assert (at["found"], *at.item()[1:]) == (TASK, *want)
        for share in shares:
            number = phases * want[0] + want[1]
            if not share["rows"]:
                continue
            assert share["expert_slot"] == number
            start, rows = int(share["first_row"]) - first_row, int(share["rows"])
            column = int(share["column"]) * cluster + int(share["part"])
            covered[number][start : start + rows, column : column + int(share["parts"])] += 1
            assert rows <= BLOCK_M
            for row in range(start, start + rows):  # its place in the ring is the same for all tiles
                assert serials[number].setdefault(row, int(share["serial"])) == share["serial"]
    for rows_by_columns, of_rows in zip(covered, serials):
        assert (rows_by_columns == 1).all()
        blocks = sorted(set(of_rows.values()))
        assert [of_rows[row] for row in sorted(of_rows)] == sorted(of_rows.values())
        assert not blocks or blocks == list(range(blocks[0], blocks[0] + len(blocks)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    cluster=st.sampled_from([1, 2]),
    phases=st.sampled_from([2, 3]),
    claims=st.integers(1, 32),
    entries=st.integers(0, 1 << 16),
    offset=st.integers(-1000, 1000),
    closed=st.booleans(),
)
def test_a_ticket_waits_until_its_entry_is_there_or_none_follows(
    cluster: int, phases: int, claims: int, entries: int, offset: int, closed: bool
) -> None:
    per_entry = claims * sum(TILES[:phases])
    tickets = entries * per_entry
    ticket = max(0, tickets + offset)
    blocks = np.zeros(phases * (entries + 1), READY_BLOCK.dtype)
    at, _ = ask(cluster, phases, ticket, library(cluster, phases).word(entries, claims * cluster, closed), blocks)
    assert at["found"] == (TASK if ticket < tickets else CLOSED if closed else WAITING)
    if ticket < tickets:
        entry, rest = divmod(ticket, per_entry)
        assert (entry, *positions(claims * cluster, cluster, 1, phases)[rest][1:]) == at.item()[1:]


@pytest.mark.parametrize("cluster", [1, 2])
def test_before_the_first_entry_nobody_knows_the_size_of_a_panel(cluster: int) -> None:
    nothing = np.zeros(1, READY_BLOCK.dtype)
    assert ask(cluster, 2, 7, 0, nothing)[0]["found"] == WAITING
    assert ask(cluster, 2, 7, IS_CLOSED, nothing)[0]["found"] == CLOSED
