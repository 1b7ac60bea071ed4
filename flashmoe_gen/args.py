"""The structs and enums that a kernel shares with its launcher or its plan, each defined once."""

from __future__ import annotations

from collections.abc import Sequence

from .spec import MAX_EXPERTS, MAX_WORLD_SIZE
from .structs import Enum, Struct, struct

_WARP = 32

LIST_ENTRY = struct(
    "ListEntry",
    ("token_slot", "u32", "token of the source << 8 | its place among the routes of the token"),
    ("weight", "float", "of the route"),
)
SUMMAND = struct(
    "Summand",  # beside each list entry, for an owner that sums its rows of a token
    ("first", "u32", "place of the token's first route here among all the source sends here, in token order"),
    ("index_of", "u32", "which of the token's routes here it is << 8 | how many they are"),
)
SEGMENT = struct(
    "Segment",
    ("first", "u32", "ordinal of the first row among all the source sends here", (), 16),
    ("rows", "u32", "for this expert"),
    ("start", "u32", "rows of this expert from nearer sources"),
    ("source", "u32", ""),
)
READY_BLOCK = struct(
    "ReadyBlock",
    ("expert_slot", "u32", "local expert"),
    ("first_row", "u32", "among the expert's rows of all sources"),
    ("rows", "u32", "of the M-block, or of a whole panel of them; 0: there is none"),
    ("serial", "u32", "number of the (first) M-block in the order of the queue"),
)
CONTROL = struct(
    "Control",
    ("entered", "u32", "processors that have begun the call; with the epoch, one word: both are read and changed at once", (), 8),
    ("epoch", "u32", "calls finished on this heap, as words name them: see next_epoch()"),
    ("aborted", "u32", "set when a rank gives up, here or elsewhere; cleared by reset()"),
    ("claimed", "u32", "the record has a writer"),
)
SCRATCH_STATE = struct(
    "ScratchState",
    ("calls", "u32", "that used this scratch: picks the counter set", (), 16),
    ("used", "u32", "words of each set that its last call may have changed", (2,)),
    ("unused", "u32", ""),
)
STATE = struct(
    "State",
    ("calls", "u32", "finished"),
    ("unused", "u32", ""),
    ("routes", "u64", "routes sent to experts on any rank, over all calls"),
    ("masked", "u64", "routes with a negative id"),
    ("invalid", "u64", "routes with an id that is no expert"),
    ("dropped", "u64", "routes over the capacity"),
    ("rows", "u64", "expert rows computed here"),
    ("blocks", "u64", "M-blocks computed here"),
)
ABORT_RECORD = struct(
    "AbortRecord",
    ("filled", "u32", "1 once the rest is valid"),
    ("rank", "u32", "who gave up"),
    ("block", "u32", "its block (GPU) or thread (host)"),
    ("role", "u32", "a Role"),
    ("what", "u32", "an Await"),
    ("detail", "u32", "source rank, tile or entry"),
    ("expected", "u64", "value waited for"),
    ("seen", "u64", "value last seen"),
)
ROLE = Enum("Role", dict.fromkeys(("planner", "scheduler", "subscriber", "processor"), ""))
AWAIT = Enum(
    "Await",
    {
        "planners": "the planners of its rank (phase {detail})",
        "counts": "the counts of rank {detail}",
        "rows": "token rows of rank {detail}",
        "task": "task {detail} of the queue",
        "gemm1": "GEMM1 tile {detail}",
        "returns": "an expert row from rank {detail}",
        "tag": "the same call on rank {detail}",
        "launch": "the end of another launch of the same rank",
    },
)
# Not waits that were too long: ranks that call different things, and launches of one rank that run at the same time.
TAG, OVERLAP = (list(AWAIT.members).index(name) for name in ("tag", "launch"))
ROLES, AWAITS = tuple(ROLE.members), tuple(AWAIT.members.values())

TRACE_EVENT = struct(
    "TraceEvent",
    ("work", "u32", "a Work"),
    ("what", "u32", "M-block and tile, token, ...", (2,)),
    ("unused", "u32", ""),
    ("start", "u64", "ns"),
    ("end", "u64", "ns"),
)
# The members of the C++ enum Work, and their names in a trace.
WORKS = {
    "kernel": "kernel",
    "count_routes": "count routes",
    "wait_planners": "wait for planners",
    "write_lists": "write lists",
    "wait_lists": "wait for lists",
    "dispatch": "dispatch",
    "gather_counts": "gather counts",
    "append": "append",
    "fetch": "wait for task",
    "resolve": "look up rows",
    "weights": "load weights",
    "gather": "gather rows",
    "wait_gemm1": "wait for GEMM1",
    "gemm1": "GEMM1",
    "gemm2": "GEMM2",
    "fill": "wait for stage",
    "epilogue": "epilogue",
    "return_rows": "return rows",
    "wait_returns": "wait for rows back",
    "combine": "combine",
    "leave": "leave",
}
WORK = Enum("Work", WORKS)

# ---- In the memory of a rank or of a block: the kernel's own, but the plan has to know how much it takes ----
COUNTERS = struct(
    "Counters",  # two sets, call n clears the set of call n + 1
    ("planners_counted", "u32"),
    ("planners_listed", "u32"),
    ("dispatch_ticket", "u32"),
    ("task_ticket", "u32"),
    ("queue", "u64", "queue_word()"),
    ("combine_ticket", "u32"),
    ("left", "u32"),
    ("list_sent", "u32", "per owner: entries of its list that are on their way", (MAX_WORLD_SIZE,)),
    ("arrived", "u32", "per source: leading dispatch chunks that are here, kAllChunks when all are", (MAX_WORLD_SIZE,)),
)
TALLY = Enum("Tally", dict.fromkeys(("live", "dropped", "masked", "invalid"), ""))  # what became of a route
PLANNER_SCRATCH = struct(
    "PlannerScratch",
    ("count", "u32", "routes per expert, here and below by position", (MAX_EXPERTS,)),
    ("base", "u32", "routes of the planners before", (MAX_EXPERTS,)),
    ("offset", "u32", "routes to the experts before", (MAX_EXPERTS,)),
    ("placed", "u32", "per owner: routes to it that have their place in token order", (MAX_WORLD_SIZE,)),
    ("tally", "u32", "this planner's routes by Tally", (len(TALLY.members),)),
)
SYSTEM_SCRATCH = struct(
    "SystemScratch",
    ("rows", "u32", "of the scheduler: per local expert, over all sources", (MAX_EXPERTS,)),
    ("first_panel", "u32", "of the scheduler: panels of the experts before", (MAX_EXPERTS,)),
    ("source_start", "u32", "of the scheduler: rows of the sources before", (MAX_WORLD_SIZE,)),
    ("arrived", "u32", "of the subscriber: leading chunks per source", (MAX_WORLD_SIZE,)),
)
SCRATCH_BYTES = max(PLANNER_SCRATCH.size, SYSTEM_SCRATCH.size)

SHARE = Enum(
    "Share",  # how the members of a cluster share a claim
    {
        "rows": "each has an M-block of its own: all multiply the same weights",
        "columns": "each has a part of the columns of the tile",
        "tiles": "each has a tile of its own, of neighbouring ones",
    },
    "u8",
)


def task_kind(phases: Sequence[str]) -> Enum:
    """The kinds of tasks: the phases of a plan by name, and the end of the queue."""
    return Enum("TaskKind", dict.fromkeys([*phases, "closed"], ""))


TASK = struct(
    "Task",
    ("kind", task_kind(()), "the phase"),
    ("serial", "u32", "of its first M-block"),
    ("column", "u32", "tile of the phase"),
    ("once", "bool", "no other claim reads its weight tile"),
    ("share", SHARE),
    ("part", "u8", "of the columns of the tile, when they are shared"),
    ("block", READY_BLOCK, "no rows: there is nothing to do"),
)


def _sums(threads: int) -> tuple[object, ...]:
    """A word per warp; they are read four at a time."""
    return "sums", "u32", "of BlockGroup", (-(-threads // (4 * _WARP)) * 4,), 16


def mma_structs(block_m: int, threads: int) -> tuple[Struct, ...]:
    """What an mma block keeps in shared memory behind its work; ``BlockState`` is the last."""
    slot = struct(
        "TaskSlot",
        ("task", TASK),
        ("weight", "float", "of the route", (block_m,)),
        ("row", "const char*", "GEMM1: the input row; GEMM2: where the result goes", (block_m,)),
    )
    return slot, struct("BlockState", ("slot", slot, "", (2,)), _sums(threads))


def wgmma_structs(block_m: int, threads: int, stages: int, cluster: int) -> tuple[Struct, ...]:
    """What a wgmma block keeps in shared memory behind its work; ``BlockState`` is the last."""
    slot = struct(
        "TaskSlot",
        ("task", TASK),
        ("spoiled", "u32", "an abort left rows that must not be published; set before the last stage is full"),
        ("weight", "float", "of the route", (block_m,)),
        ("from", "const char*", "GEMM1: the input row", (block_m,)),
        ("to", "char*", "GEMM1: of the intermediate, GEMM2: where the result goes", (block_m,)),
    )
    slots = (2,)
    state = struct(
        "BlockState",
        ("slot", slot, "", slots),
        _sums(threads),
        ("stage_full", "u64", "mbarriers from here on", (stages,)),
        ("stage_empty", "u64", "", (stages,)),
        ("slot_full", "u64", "", slots),
        ("slot_empty", "u64", "", slots),
        ("near_end", "u64", "the loads of a task are nearly all issued: time to claim the next"),
        ("stored", "u64", "the consumers have stored a task's results", slots),
        ("mail_full", "u64", "", slots),
        ("mail", TASK, "a claim of the cluster's first block", slots, 16),
        ("able", "u32", "which blocks of the cluster can run tasks", (cluster,)),
    )
    return slot, state



MOE_ARGS = struct(
    "MoEArgs",
    ("x", "const Input*", "[tokens, H] of this rank"),
    ("topk_ids", "const int*", "[tokens, k] global expert ids, < 0: masked"),
    ("topk_weights", "const float*", "[tokens, k]"),
    ("y", "Output*", "[tokens, H], out"),
    ("num_tokens", "const int*", "[1] tokens of this call, or null: all"),
    ("gate", "const Weight*", "[E_local, I, H]"),
    ("up", "const Weight*", "[E_local, I, H]"),
    ("down", "const Weight*", "[E_local, H, I]"),
    ("gate_bias", "const Bias*", "[E_local, I]"),
    ("up_bias", "const Bias*", "[E_local, I]"),
    ("down_bias", "const Bias*", "[E_local, H]"),
    ("gate_expert_stride", "i64", "all weight and bias strides in bytes"),
    ("gate_row_stride", "i64", ""),
    ("up_expert_stride", "i64", ""),
    ("up_row_stride", "i64", ""),
    ("down_expert_stride", "i64", ""),
    ("down_row_stride", "i64", ""),
    ("gate_bias_expert_stride", "i64", ""),
    ("gate_bias_stride", "i64", ""),
    ("up_bias_expert_stride", "i64", ""),
    ("up_bias_stride", "i64", ""),
    ("down_bias_expert_stride", "i64", ""),
    ("down_bias_stride", "i64", ""),
    ("expert_position", "const int*", "[E] expert -> position (rank by rank, slot by slot)"),
    ("owner_first", "const int*", "[world_size + 1] first position of each rank"),
    ("position_owner", "const int*", "[E] position -> rank"),
    ("peers", "char*", "the symmetric heap of each rank", (MAX_WORLD_SIZE,)),
    ("failures_at", "i64", "heap offsets, in bytes"),
    ("counts_at", "i64", ""),
    ("list_signals_at", "i64", ""),
    ("chunk_signals_at", "i64", ""),
    ("return_signals_at", "i64", ""),
    ("lists_at", "i64", ""),
    ("summands_at", "i64", ""),
    ("rows_at", "i64", ""),
    ("returns_at", "i64", ""),
    ("source_stride", "i64", "bytes of token rows per source"),
    ("count_stride", "i64", "words per source"),
    ("chunk_stride", "i64", "words per source"),
    ("list_stride", "i64", "entries per source"),
    ("scratch_state", "ScratchState*", "scratch from here on, shared by the layers of a communicator"),
    ("counter_sets", "u32*", "two sets, set_stride words apart"),
    ("appended", "u32*", "[panels, by expert] epoch of the call that appended it"),
    ("planner_counts", "u32*", "[planner][E]"),
    ("route_owner", "int*", "[tokens, k] rank, -1: not live"),
    ("outgoing_list", "ListEntry*", "[tokens * k] by owner: what is sent to each"),
    ("outgoing_summands", "Summand*", "[tokens * k] beside it; first is the route's own place until it is sent"),
    ("outgoing_first", "u32*", "[world_size + 1] first entry of each owner"),
    ("segments", "Segment*", "[E_local][distance of the source]"),
    ("pool_first", "u32*", "[source] first row of the pool that the source's rows take, kNoRoom: they are not summed here"),
    ("ready", "ReadyBlock*", "[panels] in the order they entered the queue"),
    ("entries", "ReadyBlock*", "[2 * panels][phase] the queue: whose tasks of each phase an entry hands out"),
    ("ring", "Middle*", "[ring_slots, kBlockM, I] intermediate"),
    ("staged_rows", "Returned*", "[pool_rows, H] rows that are summed here"),
    ("staged_entries", "ListEntry*", "[pool_rows] their routes"),
    ("state", "State*", "of this layer"),
    ("record", "AbortRecord*", "host-visible"),
    ("trace", "TraceEvent*", "[party][track][trace_events]"),
    ("trace_counts", "u32*", "[party][track] events so far"),
    ("timeout_ns", "i64", "deadline of every wait, 0: none"),
    ("set_stride", "i64", "words"),
    ("set_words", "int", "words of a counter set that this layer uses"),
    ("column_bits_at", "int", "word offsets in a set"),
    ("done_parts_at", "int", ""),
    ("routes_done_at", "int", ""),
    ("tokens", "int", "rows of x"),
    ("max_tokens", "int", "of any rank"),
    ("num_experts", "int", "E, over all ranks"),
    ("local_experts", "int", "E_local"),
    ("capacity", "int", "most rows per (expert, source rank)"),
    ("rank", "int", ""),
    ("world_size", "int", ""),
    ("tag", "u32", "layer << 16 | placement: the same on all ranks, or they do not make the same call"),
    ("pool_rows", "int", "room for rows that are summed here before they go back; 0: each goes back as it is"),
    ("ring_slots", "int", "M-blocks of intermediate that fit the ring"),
    ("lag", "int", "M-blocks whose GEMM1 come between a GEMM1 and its GEMM2 in the task order"),
    ("max_panel", "int", "most M-blocks of a panel"),
    ("trace_events", "int", "room per track"),
    ("delay_ns", "int", "longest random delay before something is published"),
)

ROUTER_ARGS = struct(
    "RouterArgs",
    ("x", "const Element*", "[tokens, H]"),
    ("router_weight", "const Element*", "[E, H]"),
    ("logit_bias", "const float*", "[E] added to the logits, or null"),
    ("selection_bias", "const float*", "[E] added to the scores for the choice alone, or null"),
    ("topk_ids", "int*", "[tokens, k], out"),
    ("topk_weights", "float*", "[tokens, k], out"),
    ("logits", "Acc*", "[tokens, E] workspace, need not be cleared"),
    ("counters", "u32*", "[RouterPlan.counter_words] workspace (GPU), zero before and after every call"),
    ("num_tokens", "const int*", "[1] tokens of this call, or null: all"),
    ("tokens", "int", "rows of x"),
    ("num_experts", "int", "E"),
    ("num_groups", "int", ""),
    ("top_groups", "int", ""),
)

# ---- Of the explorer ----
LAUNCH = struct("Launch", ("kernel", "Kernel"), ("args", "const void*"))
HEAP = struct("Heap", ("base", "char*"), ("bytes", "u64"))

MOE_STRUCTS: tuple[Enum | Struct, ...] = (
    ROLE, AWAIT, WORK, TALLY, SHARE, LIST_ENTRY, SUMMAND, SEGMENT, READY_BLOCK, CONTROL, SCRATCH_STATE, STATE, ABORT_RECORD,
    TRACE_EVENT, COUNTERS, PLANNER_SCRATCH, SYSTEM_SCRATCH, TASK, MOE_ARGS,
)  # fmt: skip
ROUTER_STRUCTS = (ROUTER_ARGS,)
EXPLORER_STRUCTS = (LAUNCH, HEAP)
