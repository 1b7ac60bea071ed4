// ---- The pipeline: stages in shared memory between one block's loaders and its two consumer warpgroups ---------------------
// A stage holds one k step of kBlockM rows and kBlockN weight rows, 128 bytes each. It is full when the TMA has brought the
// weights and the row warp the rows; it is empty when every consumer warp has multiplied it. Whoever uses the pipeline
// counts its own turns, over all tasks: the loaders are up to kStages steps ahead, also into the next task.
// Where the blocks of a cluster multiply the same weights, each loads a part of them into the stages of all, so L2 is read once
// for the cluster. Their stages turn together, in every task: one is empty when the consumers of all blocks are done.
// Where they split a tile by columns, a stage holds kCluster k steps of their part of the weights and of as few rows.
constexpr int kStages = ${tile.stages};
constexpr int kConsumers = kBlockM / 64;  // warpgroups
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kConsumerThreads = kConsumers * 128;
constexpr int kThreads = ${plan.threads};
static_assert(kThreads == 128 + kConsumerThreads);

static_assert(kRowBytes == 128);
static_assert(WeightOperand::kAt % 1024 == 0 && kStageBytes % 1024 == 0, "the swizzle is a function of the address");
static_assert(OperandA::kTokens && !OperandB::kTokens, "the epilogues have a token in every row");

constexpr int kWorkBytes = ${plan.work_bytes};  // of dynamic shared memory: the stages, then a patch per consumer warp
constexpr int kSharedBytes = ${plan.shared_bytes};

// In dynamic shared memory behind the work: slots for a task and its M-block's rows, resolved by the fetch warp while the task
// before runs, and the barriers of the block.
//% for struct in block_structs
${struct.cpp}
//% endfor
static_assert(kWorkBytes % 128 == 0 && kWorkBytes + sizeof(BlockState) == kSharedBytes);

// How a tile is multiplied: whole by this block, or split by columns.
template <bool kSplit>
struct Shape {
  static constexpr int kParts = kSplit ? kCluster : 1;  // of the columns
  static constexpr int kStageSteps = kParts;            // k steps in a stage: each takes as much less room
  static constexpr int kStageK = kBlockK * kStageSteps;  // elements of k in a stage
  template <class Operand>
  static constexpr u32 kStepBytes = Operand::kBytes / kParts;  // of one k step
  template <int kDepth>
  static constexpr int kSteps = (kDepth + kStageK - 1) / kStageK;  // stages of a tile
};

// A place in a ring of kSize, and the parity of the barrier phase that the next visit waits for.
template <u32 kSize>
struct Turn {
  u32 index = 0;
  u32 phase = 0;

  DEVICE void advance() {
    if (++index < kSize) return;
    index = 0;
    phase ^= 1;
  }
};
using StageTurn = Turn<kStages>;

DEVICE void wait_barrier(u32 barrier, u32 parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}

struct Pipeline {
  u32 stages;  // shared-memory addresses
  u32 full_barriers, empty_barriers;

  template <class Operand>
  DEVICE u32 tile(const StageTurn& turn) const { return stages + turn.index * kStageBytes + Operand::kAt; }
  DEVICE u32 full(const StageTurn& turn) const { return full_barriers + turn.index * 8; }
  DEVICE u32 empty(const StageTurn& turn) const { return empty_barriers + turn.index * 8; }

  DEVICE void wait_full(const StageTurn& turn) const { wait_barrier(full(turn), turn.phase); }
  // The first visit of a stage finds it empty: the phase before a barrier's first counts as complete.
  DEVICE void wait_empty(const StageTurn& turn) const { wait_barrier(empty(turn), turn.phase ^ 1); }

  DEVICE void init() const {
    for (u32 stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full_barriers + stage * 8, 2);  // who loads weights, and who loads rows
      mbarrier_init(empty_barriers + stage * 8, kCluster * kConsumerWarps);
    }
  }
};

// ---- Loaders ----
// Weights by TMA, issued by one thread. load(to, barrier, k) issues this block's part of a k step; all of the weights arrive here
// for a stage. near_end() is called kNearEnd stages before the last.
constexpr int kNearEnd = ${plan.near_end};

template <bool kSplit, int kDepth, class Load, class NearEnd>
DEVICE void load_weights(const Pipeline& pipeline, StageTurn& turn, Load load, NearEnd near_end) {
  using Tile = Shape<kSplit>;
  constexpr int kSteps = Tile::template kSteps<kDepth>;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    if (step == (kSteps > kNearEnd ? kSteps - kNearEnd : 0)) near_end();
    pipeline.wait_empty(turn);
    mbarrier_arrive_expect_tx(pipeline.full(turn), WeightOperand::kBytes);
#pragma unroll
    for (int i = 0; i < Tile::kStageSteps; ++i)
      load(pipeline.tile<WeightOperand>(turn) + i * Tile::template kStepBytes<WeightOperand>, pipeline.full(turn),
           step * Tile::kStageK + i * kBlockK);
    turn.advance();
  }
}

// Rows anywhere in memory, by cp.async into the layout that TMA gives the weights: the 16-byte chunk of a row is permuted by
// row % 8. A lane of the warp loads the same two chunks of every 8th row, and keeps their addresses in registers: one warp
// loads all rows, so the fewer instructions the better. Eight neighbouring lanes write half of row r and half of row r + 4,
// which lie in different banks. Absent rows hold anything: their sums are not used.
struct RowGather {
  static constexpr int kRows = TokenOperand::kRows / 8;  // of a lane
  static constexpr u32 kNextRows = 8 * kRowBytes;
  u32 lane;
  int count;                // rows that are there
  const char* from[kRows];  // this lane's chunk of the next step

  DEVICE RowGather(u32 of_lane, const char* const* rows, int there) : lane(of_lane), count(there) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = int(first_row()) + i * 8;  // in place of an absent one beside it: one that can be read
      from[i] = i * 8 < count ? rows[row < count ? row : count - 1] + lane % 4 * 16 : nullptr;
    }
  }

  DEVICE u32 first_row() const { return lane / 8 + lane / 4 % 2 * 4; }

  template <int kDepth, int kStageK>
  DEVICE void load(u32 stage, int step) {
    const u32 first = first_row(), byte = lane % 4 * 16;
    const u32 low = stage + first * kRowBytes + (byte ^ first * 16);
    const u32 high = stage + first * kRowBytes + (byte + 64 ^ first * 16);
    // What a row does not have of the last stage is zeros, or their products would not be.
    constexpr bool kWhole = kDepth % kStageK == 0;
    const int left = kDepth * int(sizeof(Element)) - step * kRowBytes;
    const bool low_inside = kWhole || int(byte) < left, high_inside = kWhole || int(byte) + 64 < left;
    const int high_offset = high_inside ? 64 : 0;  // chosen once: a choice between pointers would take registers for each row
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i * 8 < count) {
        cp_async_16(low + i * kNextRows, from[i], low_inside ? 16 : 0);
        cp_async_16(high + i * kNextRows, from[i] + high_offset, high_inside ? 16 : 0);
      }
      from[i] += kRowBytes;
    }
  }
};

// By the row warp. A step is handed over kLanding steps after it was issued. Consumers give a stage back when they have
// the next one, so more than kStages - 2 steps on their way would wait for each other. Nothing is on its way when this returns:
// the next task may have to wait for what this one makes.
template <bool kSplit, int kDepth>
DEVICE void gather_rows(const Pipeline& pipeline, StageTurn& turn, RowGather& gather) {
  using Tile = Shape<kSplit>;
  constexpr int kSteps = Tile::template kSteps<kDepth>, kLanding = kStages - 2;
  StageTurn landed = turn;
  const auto hand_over = [&] {
    fence_proxy_async_shared();  // each lane's copies are ordinary writes: pairs with the consumers' wait and their wgmma
    __syncwarp();
    if (gather.lane == 0) mbarrier_arrive(pipeline.full(landed));
    landed.advance();
  };
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    pipeline.wait_empty(turn);
#pragma unroll
    for (int i = 0; i < Tile::kStageSteps; ++i)
      gather.template load<kDepth, Tile::kStageK>(
          pipeline.tile<TokenOperand>(turn) + i * Tile::template kStepBytes<TokenOperand>, step * Tile::kStageSteps + i);
    cp_async_commit_group();
    turn.advance();
    if (step < kLanding) continue;
    cp_async_wait_group<kLanding>();
    hand_over();
  }
  cp_async_wait_group<0>();
#pragma unroll 1
  for (int step = kSteps < kLanding ? kSteps : kLanding; step > 0; --step) hand_over();
}
