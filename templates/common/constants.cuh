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

// ---- Tiles and tasks (computed by the planner) ----------------------------------------------------------------------
constexpr int kBlockM = ${tile.block_m};
constexpr int kBlockN = ${tile.block_n};
constexpr int kBlockK = ${tile.block_k};
constexpr int kCluster = ${tile.cluster};  // blocks that claim together, and share what they claim
constexpr int kSplitRows = ${plan.split_rows};  // most rows of an expert whose tiles they share by columns; 0: never
constexpr int kIntermediateColumns = ${plan.phases[0].tile_columns};  // columns of the intermediate that one GEMM1 tile makes
constexpr int kGemm1Tiles = ${plan.phases[0].tiles};  // column tiles of GEMM1 in one M-block
constexpr int kGemm2Tiles = ${plan.phases[1].tiles};  // column tiles of GEMM2 in one M-block
constexpr int kColumnWords = ${plan.column_words};                  // 32-bit words that hold a bit per part of a GEMM1 tile
constexpr int kPartColumns = kIntermediateColumns / kCluster;  // progress is counted in parts of column tiles
constexpr int kGemm2Parts = kGemm2Tiles * kCluster;
constexpr int kChunkTokens = ${plan.chunk_tokens};                  // tokens of one dispatch task; fixed for every kernel of a heap
constexpr int kPlannerTokens = ${plan.planner_tokens};              // fewest tokens worth a planner of their own
constexpr int kMaxWorldSize = ${plan.max_world_size};
${plan.task_kind.cpp}
