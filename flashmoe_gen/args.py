"""The structs a kernel and its launcher share, each defined once: rendered as C++ here, packed with NumPy there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .spec import MAX_WORLD_SIZE

_SCALARS = {"u32": "u4", "int": "i4", "float": "f4", "u64": "u8", "i64": "i8"}
_CPP = {"i64": "long long"}


@dataclass(frozen=True)
class Field:
    """One member: C++ type (a scalar, or a pointer written ``T*``), meaning, and length when it is an array."""

    name: str
    type: str
    doc: str
    count: int = 0

    @property
    def declaration(self) -> str:
        return f"{_CPP.get(self.type, self.type)} {self.name}" + (f"[{self.count}]" if self.count else "")

    @property
    def format(self) -> object:
        base = "u8" if self.type.endswith("*") else _SCALARS[self.type]
        return (base, (self.count,)) if self.count else base


@dataclass(frozen=True)
class Struct:
    """A struct with C layout; pointers are 8 bytes."""

    name: str
    fields: tuple[Field, ...]

    @cached_property
    def dtype(self) -> np.dtype:
        """The NumPy structured dtype with the same layout."""
        names = [field.name for field in self.fields]
        return np.dtype({"names": names, "formats": [field.format for field in self.fields]}, align=True)

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def zeros(self) -> np.ndarray:
        """A one-element array of the struct, all zero."""
        return np.zeros(1, dtype=self.dtype)


def _struct(name: str, *fields: tuple[str, str, str] | tuple[str, str, str, int]) -> Struct:
    return Struct(name, tuple(Field(*field) for field in fields))


LIST_ENTRY = _struct(
    "ListEntry",
    ("token_slot", "u32", "token of the source << 8 | slot of the row that comes back"),
    ("weight", "float", "of the route"),
)
SEGMENT = _struct(
    "Segment",
    ("first", "u32", "ordinal of the first row among all the source sends here"),
    ("rows", "u32", "for this expert"),
)
READY_BLOCK = _struct(
    "ReadyBlock",
    ("expert_slot", "u32", "local expert"),
    ("first_row", "u32", "among the expert's rows of all sources"),
    ("rows", "u32", "of the M-block, or of a whole panel of them; 0: there is none"),
    ("serial", "u32", "number of the (first) M-block in the order of the queue"),
)
CONTROL = _struct(
    "Control",
    ("epoch", "u32", "calls finished on this heap"),
    ("aborted", "u32", "set when a wait missed its deadline; cleared by reset()"),
    ("claimed", "u32", "the record has a writer"),
    ("unused", "u32", ""),
)
STATE = _struct(
    "State",
    ("calls", "u32", "of this layer: picks the counter set"),
    ("unused", "u32", ""),
    ("routes", "u64", "routes sent to experts on any rank, over all calls"),
    ("masked", "u64", "routes with a negative id"),
    ("invalid", "u64", "routes with an id that is no expert"),
    ("dropped", "u64", "routes over the capacity"),
    ("rows", "u64", "expert rows computed here"),
    ("blocks", "u64", "M-blocks computed here"),
)
ABORT_RECORD = _struct(
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
# Names of the C++ enums Role and Await, in order.
ROLES = ("planner", "scheduler", "subscriber", "processor")
AWAITS = (
    "the planners of its rank (phase {detail})",
    "the counts of rank {detail}",
    "token rows of rank {detail}",
    "task {detail} of the queue",
    "GEMM1 tile {detail}",
    "an expert row from rank {detail}",
)

TRACE_EVENT = _struct(
    "TraceEvent",
    ("work", "u32", "a Work"),
    ("what", "u32", "M-block and tile, token, ...", 2),
    ("unused", "u32", ""),
    ("start", "u64", "ns"),
    ("end", "u64", "ns"),
)
# The C++ enum Work, in order, and its name in a trace.
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

MOE_ARGS = _struct(
    "MoEArgs",
    ("x", "const Element*", "[tokens, H] of this rank"),
    ("topk_ids", "const int*", "[tokens, k] global expert ids, < 0: masked"),
    ("topk_weights", "const float*", "[tokens, k]"),
    ("y", "Element*", "[tokens, H], out"),
    ("num_tokens", "const int*", "[1] tokens of this call, or null: all"),
    ("gate", "const Element*", "[E_local, I, H]"),
    ("up", "const Element*", "[E_local, I, H]"),
    ("down", "const Element*", "[E_local, H, I]"),
    ("gate_bias", "const Element*", "[E_local, I]"),
    ("up_bias", "const Element*", "[E_local, I]"),
    ("down_bias", "const Element*", "[E_local, H]"),
    ("gate_expert_stride", "i64", "all weight and bias strides in elements"),
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
    ("peers", "char*", "the symmetric heap of each rank", MAX_WORLD_SIZE),
    ("counts_at", "i64", "heap offsets, in bytes"),
    ("chunk_signals_at", "i64", ""),
    ("return_signals_at", "i64", ""),
    ("lists_at", "i64", ""),
    ("ordinals_at", "i64", ""),
    ("rows_at", "i64", ""),
    ("returns_at", "i64", ""),
    ("source_stride", "i64", "bytes of token rows per source"),
    ("count_stride", "i64", "words per source"),
    ("chunk_stride", "i64", "words per source"),
    ("list_stride", "i64", "entries per source"),
    ("staged_stride", "i64", "rows per source"),
    ("planner_counts", "u32*", "workspace from here on: [planner][E]"),
    ("route_target", "int*", "[tokens, k] owner << 8 | return slot, -1: not live"),
    ("segments", "Segment*", "[source][E_local]"),
    ("ready", "ReadyBlock*", "[panels] in the order they entered the queue"),
    ("entries", "ReadyBlock*", "[2 * panels][2] the queue: whose GEMM1, and whose GEMM2, an entry hands out"),
    ("appended", "u32*", "[panels, by expert] epoch of the call that appended it"),
    ("ring", "Element*", "[ring_slots, kBlockM, I] intermediate"),
    ("staged_rows", "Element*", "[source][staged_stride][H], combine by rank only"),
    ("counter_sets", "u32*", "two sets of set_words"),
    ("state", "State*", ""),
    ("record", "AbortRecord*", "host-visible"),
    ("trace", "TraceEvent*", "[party][track][trace_events]"),
    ("trace_counts", "u32*", "[party][track] events so far"),
    ("timeout_ns", "i64", "deadline of every wait, 0: none"),
    ("set_words", "int", "words of one counter set"),
    ("column_bits_at", "int", "word offsets in a set"),
    ("gemm2_done_at", "int", ""),
    ("routes_done_at", "int", ""),
    ("tokens", "int", "rows of x"),
    ("max_tokens", "int", "of any rank"),
    ("num_experts", "int", "E, over all ranks"),
    ("local_experts", "int", "E_local"),
    ("capacity", "int", "most rows per (expert, source rank)"),
    ("rank", "int", ""),
    ("world_size", "int", ""),
    ("combine_by_rank", "int", "1: owners sum their routes of a token before they send"),
    ("return_slots", "int", "rows that can come back per token"),
    ("ring_slots", "int", "M-blocks of intermediate that fit the ring"),
    ("lag", "int", "M-blocks whose GEMM1 come between a GEMM1 and its GEMM2 in the task order"),
    ("max_panel", "int", "most M-blocks of a panel"),
    ("trace_events", "int", "room per track"),
    ("delay_ns", "int", "longest random delay before something is published"),
)

ROUTER_ARGS = _struct(
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

MOE_STRUCTS = (LIST_ENTRY, SEGMENT, READY_BLOCK, CONTROL, STATE, ABORT_RECORD, TRACE_EVENT, MOE_ARGS)
ROUTER_STRUCTS = (ROUTER_ARGS,)
