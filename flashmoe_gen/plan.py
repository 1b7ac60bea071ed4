"""All arithmetic: the phases of an M-block, their tiles and operands, rows in memory, and the schedule of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .args import COUNTERS, task_kind
from .dtypes import get_dtype
from .errors import SpecError
from .spec import MoESpec
from .structs import Enum
from .tile import Combine, Schedule, TileConfig
from .values import require_counts

COUNT_HEADER = 2  # words of a source before its rows per expert slot: its tokens, its tag
CHUNK_TOKENS = 16  # tokens of one dispatch task: a signal's meaning, so the same for every kernel of a heap
PLANNER_TOKENS = 32  # fewest tokens worth a planner of their own
WARP = 32
_L2_SHARE = 32 << 20  # bytes of one expert's weights that neighbouring M-blocks find in a GPU's L2: measured on H100
_PANEL = 8
_RING_BYTES = 48 << 20  # of the intermediate that GEMM2 finds in L2: H100 has 50 MB


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class RowFormat:
    """A row of one operand as it lies in memory.

    Attributes:
        dtype: of its elements.
        columns: elements of a row.
    """

    dtype: str
    columns: int

    @property
    def bytes(self) -> int:
        """From a row to the next where rows follow each other."""
        return self.columns * get_dtype(self.dtype).size

    def __str__(self) -> str:
        return f"{self.columns} x {self.dtype}, {self.bytes} bytes"


@dataclass(frozen=True)
class RowFormats:
    """What each operand's rows look like; they need not be alike.

    Attributes:
        input: of ``x``.
        gate_up: of the weight matrices of GEMM1.
        down: of the weight matrix of GEMM2.
        middle: of the intermediate between the two.
        sent: token rows in the heap of the rank that owns an expert.
        returned: expert rows on their way back.
        output: of ``y``.
    """

    input: RowFormat
    gate_up: RowFormat
    down: RowFormat
    middle: RowFormat
    sent: RowFormat
    returned: RowFormat
    output: RowFormat

    @classmethod
    def of(cls, spec: MoESpec) -> RowFormats:
        """Everything in the spec's dtype."""
        hidden, middle = RowFormat(spec.dtype, spec.hidden_size), RowFormat(spec.dtype, spec.intermediate_size)
        return cls(input=hidden, gate_up=hidden, down=middle, middle=middle, sent=hidden, returned=hidden, output=hidden)


@dataclass(frozen=True)
class Operand:
    """One side of a matrix product.

    Attributes:
        matrix: what it is: the M-block's rows, or the expert's weights.
        source: where the instruction takes it from.
    """

    matrix: Literal["tokens", "weights"]
    source: Literal["shared", "registers"] = "shared"


@dataclass(frozen=True)
class Phase:
    """One kind of task that every M-block goes through. The table's order is the order of the tickets.

    Attributes:
        name: of the task kind.
        tiles: column tiles of an M-block, a task each.
        tile_columns: columns of the result that one of them makes.
        width: columns of the result.
        depth: elements that a column sums over.
        a, b: operands of the product; ``a`` has the instruction's rows.
        waits_for: what has to be there first: ``"rows"``, or the phase whose tiles it reads.
        publishes: what the end of a tile makes known: ``"tiles"``, each on its own, or the finished M-block's ``"rows"``.
    """

    name: str
    tiles: int
    tile_columns: int
    width: int
    depth: int
    a: Operand
    b: Operand
    waits_for: str
    publishes: Literal["tiles", "rows"]

    def __str__(self) -> str:
        return f"{self.tiles} tiles of {self.tile_columns} columns (of {self.width}), {self.depth} deep"


def mlp_phases(spec: MoESpec, tile: TileConfig, gemm1_columns: int, a: Operand, b: Operand) -> tuple[Phase, ...]:
    """The two products of an expert's MLP; a GEMM1 tile makes ``gemm1_columns`` columns of the intermediate."""
    hidden, middle = spec.hidden_size, spec.intermediate_size
    gemm1 = Phase("gemm1", ceil_div(middle, gemm1_columns), gemm1_columns, middle, hidden, a, b, "rows", "tiles")
    gemm2 = Phase("gemm2", ceil_div(hidden, tile.block_n), tile.block_n, hidden, middle, a, b, "gemm1", "rows")
    return gemm1, gemm2


@dataclass(frozen=True)
class KernelPlan:
    """The numbers of one fused MoE kernel; a block program may add its own.

    Attributes:
        phases: the tasks of an M-block.
        rows: the operands' rows in memory.
        column_words: 32-bit words that hold a bit per part of a tile of the first phase: a tile has ``cluster`` parts.
        split_rows: most rows of an expert whose tiles the blocks of a cluster split by columns, 0 when they never do.
        threads: threads of a block (GPU), 0 on the host.
        stage_bytes: shared memory of one pipeline stage.
        work_bytes: shared memory of whoever works: the stages, a staged tile, or the planner's and the scheduler's scratch.
        shared_bytes: dynamic shared memory of a block.
        min_blocks: blocks of a multiprocessor that the registers are limited for.
    """

    phases: tuple[Phase, ...]
    rows: RowFormats
    column_words: int
    split_rows: int
    threads: int = 0
    stage_bytes: int = 0
    work_bytes: int = 0
    shared_bytes: int = 0
    min_blocks: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    planner_tokens: int = PLANNER_TOKENS
    count_header: int = COUNT_HEADER

    @property
    def tracks(self) -> int:
        """Warps of a block, one thread on the host: each keeps its own trace."""
        return max(1, self.threads // WARP)

    @property
    def tasks(self) -> int:
        """Tasks of one M-block, over all phases."""
        return sum(phase.tiles for phase in self.phases)

    @property
    def task_kind(self) -> Enum:
        """What a task is: one of the phases."""
        return task_kind([phase.name for phase in self.phases])

    def phase(self, name: str) -> Phase:
        """The phase of that name; raises ``KeyError``."""
        return {phase.name: phase for phase in self.phases}[name]

    def table(self) -> dict[str, object]:
        """All numbers by name, for people to read."""
        nested = {"rows": vars(self.rows), "phases": {phase.name: phase for phase in self.phases}}
        flat: dict[str, object] = {}
        for name, value in vars(self).items():
            prefix = "row of " if name == "rows" else ""
            flat |= {f"{prefix}{inner}": part for inner, part in nested[name].items()} if name in nested else {name: value}
        return flat


def common_plan(spec: MoESpec, tile: TileConfig, phases: tuple[Phase, ...], *, column_step: int) -> dict[str, Any]:
    """What every program plans in the same way. ``column_step``: columns that its epilogue stores at a time."""
    splits = tile.cluster > 1 and all(phase.tile_columns % (tile.cluster * column_step) == 0 for phase in phases)
    return {
        "phases": phases,
        "rows": RowFormats.of(spec),
        "column_words": ceil_div(phases[0].tiles * tile.cluster, 32),
        "split_rows": tile.block_m // 2 if splits else 0,  # on a GPU the rows of a warpgroup
    }


def resolve_combine(spec: MoESpec, schedule: Schedule) -> Combine:
    """How rows come back: as the schedule says, else one by one, which two GPUs have measured to be faster in every case.

    Raises:
        SpecError: ``combine="rank"`` with ``batch_invariant=True``: the owner's sum depends on the placement.
    """
    if spec.batch_invariant and schedule.combine == "rank":
        raise SpecError("combine='rank' is not valid with batch_invariant=True. Must be 'route' or None.")
    return schedule.combine or "route"


def pool_rows(spec: MoESpec, combine: Combine) -> int:
    """Rows of other ranks that may wait for each other to be summed: what uniform routing sends, and a little more.

    Where more come, those of the farthest sources go back one by one.
    """
    if combine == "route" or spec.world_size == 1:
        return 0
    routes, others = spec.max_tokens * spec.top_k, spec.world_size - 1
    return min(routes * others, ceil_div(routes * others, spec.world_size) + routes // 16 + 32 * spec.top_k)


@dataclass(frozen=True)
class SchedulePlan:
    """The launch arguments of one rank's layer that decide the order of its tasks, and how many there can be.

    Attributes:
        rows: most expert rows of a call.
        blocks: most M-blocks of a call.
        lag, max_panel, ring_slots: as :class:`~flashmoe_gen.Schedule` has ``lag``, ``panel`` and ``ring``, none of them open.
        column_bits_at, done_parts_at, routes_done_at: word offsets in a counter set.
        set_words: words of a counter set.
        pool_rows: as :func:`pool_rows`.
    """

    rows: int
    blocks: int
    lag: int
    max_panel: int
    ring_slots: int
    column_bits_at: int
    done_parts_at: int
    routes_done_at: int
    set_words: int
    pool_rows: int

    def arguments(self) -> dict[str, int]:
        """The fields of ``MoEArgs`` that it decides."""
        names = ("lag", "max_panel", "ring_slots", "column_bits_at", "done_parts_at", "routes_done_at", "set_words", "pool_rows")
        return {name: getattr(self, name) for name in names}


def plan_schedule(
    spec: MoESpec,
    tile: TileConfig,
    plan: KernelPlan,
    schedule: Schedule,
    *,
    combine: Combine,
    local_experts: int,
    processors: int,
) -> SchedulePlan:
    """Decide what a schedule leaves open, for a rank with so many experts and processors.

    Raises:
        UnsupportedError: more tasks or counters than the kernel can number.
    """
    routes = spec.max_tokens * spec.top_k
    per_source = routes if spec.capacity is None else min(routes, spec.capacity * local_experts)
    rows = per_source * spec.world_size if local_experts else 0
    cluster = tile.cluster
    blocks = rows // tile.block_m + cluster * min(local_experts, rows)  # the rest of an expert's rows may be a whole claim
    max_panel, lag, ring_slots = _order(spec, tile, plan, schedule, processors)
    if schedule.ring is None:
        ring_slots = min(ring_slots, _RING_BYTES // (tile.block_m * plan.rows.middle.bytes))
    ring_slots = max(cluster, min(blocks, ring_slots if schedule.ring is None else schedule.ring))
    max_panel = max(cluster, min(max_panel, ring_slots // 2 // cluster * cluster))
    column_bits_at = COUNTERS.size // 4
    done_parts_at = column_bits_at + blocks * plan.column_words
    routes_done_at = done_parts_at + blocks
    pool = pool_rows(spec, combine)
    set_words = ceil_div(routes_done_at + pool, 4) * 4
    require_counts(
        f"max_tokens={spec.max_tokens} with top_k={spec.top_k} on world_size={spec.world_size} ranks",
        rows=rows,
        tasks=2 * (rows // tile.block_m + local_experts * max_panel) * plan.tasks,
        counter_words=set_words,
    )
    return SchedulePlan(
        rows, blocks, lag, max_panel, ring_slots, column_bits_at, done_parts_at, routes_done_at, set_words, pool
    )


def _order(spec: MoESpec, tile: TileConfig, plan: KernelPlan, schedule: Schedule, processors: int) -> tuple[int, int, int]:
    """The panel, the lag and the ring slots that they need.

    Processors hold two tickets each, the running and the next one: a GEMM2 that follows its GEMM1 by fewer tasks than that would
    wait for tiles that have only just been claimed. ``lag`` M-blocks put lag GEMM1 and lag - 1 GEMM2 between.
    """
    matrices = 3 if spec.mlp == "gated" else 2
    expert_bytes = matrices * spec.intermediate_size * plan.rows.gate_up.bytes
    panel = schedule.panel or (_PANEL if expert_bytes > _L2_SHARE else 1)
    panel = ceil_div(panel, tile.cluster) * tile.cluster
    in_flight, first, last = 2 * processors * tile.cluster, plan.phases[0].tiles, plan.phases[-1].tiles
    lag = ceil_div(in_flight + last, plan.tasks) if schedule.lag is None else schedule.lag
    between = lag * plan.tasks - last
    # As the scheduler has it for full panels. Where they hold fewer M-blocks it keeps more of them, in no more slots.
    panel_lag = ceil_div(ceil_div(between, panel) + last, plan.tasks) if lag else 0
    return panel, lag, max(lag + ceil_div(in_flight, first) + 1, (panel_lag + 2) * panel)
