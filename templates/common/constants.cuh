// ---- What this kernel is specialised for --------------------------------------------------------------------------
constexpr int kHidden = ${spec.hidden_size};
constexpr int kIntermediate = ${spec.intermediate_size};
constexpr int kTopK = ${spec.top_k};
constexpr bool kGated = ${(spec.mlp == "gated") | cpp};
constexpr bool kBias = ${spec.bias | cpp};
constexpr bool kWeightOnInput = ${(spec.weight_on == "input") | cpp};
// float16 ends at 65504, so there a row is rounded after its weight was multiplied, and the intermediate is kept at half its
// size. At its lower end float16 would lose as many bits as a smaller scale gains at the upper one.
constexpr bool kWeightOnRow = ${(spec.dtype == "float16" and spec.weight_on == "output") | cpp};
constexpr bool kWeightOnSum = !kWeightOnInput && !kWeightOnRow;  // the combine multiplies
constexpr double kIntermediateScale = ${"0.5" if spec.dtype == "float16" else "1.0"};
constexpr double kSwishAlpha = ${spec.swish_alpha | cpp};
constexpr double kSwishBeta = ${spec.swish_beta | cpp};
constexpr double kGateLimit = ${spec.gate_limit | cpp};  // 0: no clamp
constexpr double kUpOffset = ${spec.up_offset | cpp};

// ---- Phases: the kinds of tasks that every M-block goes through, in the order of the tickets -----------------------------
struct Phase {
  int tiles;         // column tiles of an M-block, a task each
  int tile_columns;  // columns of the result that one of them makes
  int width;         // columns of the result
  int depth;         // elements that a column sums over
};
constexpr Phase kPhases[] = {
//% for phase in plan.phases
    {${phase.tiles}, ${phase.tile_columns}, ${phase.width}, ${phase.depth}},  // ${phase.name}
//% endfor
};
constexpr u32 kNumPhases = sizeof(kPhases) / sizeof(Phase);
${plan.task_kind.cpp}
static_assert(u32(TaskKind::closed) == kNumPhases);

// ---- Tiles and tasks (computed by the planner) ----------------------------------------------------------------------
constexpr int kBlockM = ${tile.block_m};
constexpr int kBlockN = ${tile.block_n};
constexpr int kBlockK = ${tile.block_k};
constexpr int kCluster = ${tile.cluster};  // blocks that claim together, and share what they claim
constexpr int kSplitRows = ${plan.split_rows};  // most rows of an expert whose tiles they share by columns; 0: never
constexpr int kColumnWords = ${plan.column_words};  // 32-bit words that hold a bit per part of a tile of the first phase
constexpr int kIntermediateColumns = kPhases[u32(TaskKind::gemm1)].tile_columns;
constexpr int kPartColumns = kIntermediateColumns / kCluster;  // progress is counted in parts of column tiles
constexpr int kChunkTokens = ${plan.chunk_tokens};  // tokens of one dispatch task; fixed for every kernel of a heap
constexpr int kPlannerTokens = ${plan.planner_tokens};  // fewest tokens worth a planner of their own
constexpr int kCounts = ${plan.count_header};  // words of a source before its rows per expert slot; fixed as well
