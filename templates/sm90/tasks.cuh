// ---- The two GEMM tasks as their consumers see them, and how they are published -----------------------------------------
constexpr int kWorkBytes = ${plan.work_bytes};  // of dynamic shared memory: the stages, then a patch per consumer warp
constexpr int kSharedBytes = ${plan.shared_bytes};

// One lane of each consumer warpgroup records what the warpgroup does; a member past the last tile does nothing.
DEVICE Span span_of(const Call& call, Work work, const Task& task) {
  return Span(call, work, threadIdx.x % 128 == 0 && task.block.rows != 0, task.issue, task.column);
}

// In a trace, the wait for the first stage of a task stands apart from its products.
DEVICE void trace_fill(const Call& call, const Task& task, const Pipeline& pipeline, const StageTurn& turn) {
  if constexpr (kTrace) {
    const Span span = span_of(call, Work::fill, task);
    pipeline.wait_full(turn);
  }
}

// ---- Epilogue: each warp turns its 16 rows, 64 columns at a time, into 16-byte vectors ----
struct Patch {
  static constexpr int kColumns = 64;
  static constexpr int kStride = (kColumns + 8) * int(sizeof(Element));  // 8 rows written at once: different banks
  static constexpr int kBytes = 16 * kStride;
  char* bytes;

  DEVICE void put(int row, int column, Pair pair) const {
    *reinterpret_cast<Pair*>(bytes + row * kStride + column * int(sizeof(Element))) = pair;
  }
  // A lane reads one vector of every kStep-th row.
  static constexpr int kVectors = kColumns / kVector, kStep = 32 / kVectors, kParts = 16 / kStep;
  DEVICE static int row(int part) { return int(threadIdx.x % 32) / kVectors + part * kStep; }
  DEVICE static int column() { return int(threadIdx.x % 32) % kVectors * kVector; }

  DEVICE uint4 part(int i) const {
    return *reinterpret_cast<const uint4*>(bytes + row(i) * kStride + column() * int(sizeof(Element)));
  }
};
static_assert(kStages * kStageBytes + kConsumerWarps * Patch::kBytes <= kWorkBytes);
constexpr int kMostParts = kSplitRows > 0 ? kCluster : 1;
static_assert(kBlockN / kMostParts % Patch::kColumns == 0 && kIntermediateColumns / kMostParts % Patch::kColumns == 0);

DEVICE int first_row() { return (int(threadIdx.x) / 32 - 4) * 16; }  // of this warp in the M-block
DEVICE Patch my_patch(char* work) { return {work + kStages * kStageBytes + (threadIdx.x / 32 - 4) * Patch::kBytes}; }

// pair(column, index, half) makes two neighbours of row lane / 4 + 8 half from the sums at `index` on; `column` is in the tile.
template <int kColumns, int kWidth, class MakePair>
DEVICE void store_tile(const Patch& patch, const TaskSlot& slot, int first, MakePair make_pair) {
  const int rows = int(slot.task.block.rows) - first_row();
  const int lane = int(threadIdx.x % 32);
  Element* to[Patch::kParts];  // read before the first store: the compiler cannot know that none changes them
#pragma unroll
  for (int i = 0; i < Patch::kParts; ++i) to[i] = slot.to[first_row() + Patch::row(i)] + first + Patch::column();
#pragma unroll
  for (int piece = 0; piece < kColumns; piece += Patch::kColumns) {
#pragma unroll
    for (int column = 0; column < Patch::kColumns; column += 8) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        patch.put(lane / 4 + half * 8, column + lane % 4 * 2,
                  make_pair(piece + column + lane % 4 * 2, (piece + column) / 2 + half * 2, half));
    }
    __syncwarp();
    uint4 part[Patch::kParts];
#pragma unroll
    for (int i = 0; i < Patch::kParts; ++i) part[i] = patch.part(i);
    __syncwarp();
    const bool inside = first + piece + Patch::column() < kWidth;
#pragma unroll
    for (int i = 0; i < Patch::kParts; ++i)
      if (inside && Patch::row(i) < rows) *reinterpret_cast<uint4*>(to[i] + piece) = part[i];
  }
}

DEVICE Acc bias_at(const Element* bias, long long expert_stride, long long stride, u32 expert, int column, int width) {
  if constexpr (!kBias) return Acc(0);
  return column < width ? to_acc(bias[expert * expert_stride + column * stride]) : Acc(0);
}

// ---- GEMM1: a tile of the intermediate ----
template <bool kSplit>
DEVICE void gemm1_epilogue(const MoEArgs& args, const TaskSlot& slot, const Sums<kSplit>& sums, const Patch& patch) {
  constexpr int kColumns = kIntermediateColumns / Shape<kSplit>::kParts;
  const u32 expert = slot.task.block.expert_slot;
  const int first = slot.task.first_column(kIntermediateColumns);
  const int lane = int(threadIdx.x % 32);
  const float weight[2] = {slot.weight[first_row() + lane / 4], slot.weight[first_row() + lane / 4 + 8]};
  const auto element = [&](int column, int index, int half) {
    const int c = first + column;
    Acc gate_bias = Acc(0);
    if constexpr (kGated)
      gate_bias = bias_at(args.gate_bias, args.gate_bias_expert_stride, args.gate_bias_stride, expert, c, kIntermediate);
    const Acc up_bias = bias_at(args.up_bias, args.up_bias_expert_stride, args.up_bias_stride, expert, c, kIntermediate);
    const float up = sums.value[index + (kGated ? Sums<kSplit>::kColumns / 4 : 0)];
    return intermediate_element(sums.value[index], up, gate_bias, up_bias, kWeightOnInput ? weight[half] : Acc(1));
  };
  store_tile<kColumns, kIntermediate>(
      patch, slot, first, [&](int column, int index, int half) {
        return pair_of(element(column, index, half), element(column + 1, index + 1, half));
      });
}

template <bool kSplit>
DEVICE void consume_gemm1(const Call& call, const TaskSlot& slot, char* work, const Pipeline& pipeline, StageTurn& turn) {
  const Span span = span_of(call, Work::gemm1, slot.task);
  trace_fill(call, slot.task, pipeline, turn);
  if (int(slot.task.block.rows) > int(consumer()) * 64) {
    Sums<kSplit> sums;
    multiply_tile<kSplit, kHidden>(sums, pipeline, turn);
    const Span epilogue = span_of(call, Work::epilogue, slot.task);
    gemm1_epilogue<kSplit>(call.args, slot, sums, my_patch(work));
  } else {
    pass_tile<kSplit, kHidden>(pipeline, turn);
  }
}

// ---- GEMM2: a tile of the expert's result ----
template <bool kSplit>
DEVICE void gemm2_epilogue(const MoEArgs& args, const TaskSlot& slot, const Sums<kSplit>& sums, const Patch& patch) {
  const u32 expert = slot.task.block.expert_slot;
  const int first = slot.task.first_column(kBlockN);
  const int lane = int(threadIdx.x % 32);
  const float weight[2] = {slot.weight[first_row() + lane / 4], slot.weight[first_row() + lane / 4 + 8]};
  const auto element = [&](int column, int index, int half) {
    const Acc bias =
        bias_at(args.down_bias, args.down_bias_expert_stride, args.down_bias_stride, expert, first + column, kHidden);
    return row_element(sums.value[index], bias, kWeightOnRow ? weight[half] : Acc(1));
  };
  store_tile<Sums<kSplit>::kColumns, kHidden>(
      patch, slot, first, [&](int column, int index, int half) {
        return pair_of(element(column, index, half), element(column + 1, index + 1, half));
      });
}

template <bool kSplit>
DEVICE void consume_gemm2(const Call& call, const TaskSlot& slot, char* work, const Pipeline& pipeline, StageTurn& turn) {
  const Span span = span_of(call, Work::gemm2, slot.task);
  trace_fill(call, slot.task, pipeline, turn);
  if (int(slot.task.block.rows) > int(consumer()) * 64) {
    Sums<kSplit> sums;
    multiply_tile<kSplit, kIntermediate>(sums, pipeline, turn);
    const Span epilogue = span_of(call, Work::epilogue, slot.task);
    if (slot.spoiled == 0) gemm2_epilogue<kSplit>(call.args, slot, sums, my_patch(work));
  } else {
    pass_tile<kSplit, kIntermediate>(pipeline, turn);
  }
}

template <bool kSplit>
DEVICE void consume_task(const Call& call, const TaskSlot& slot, char* work, const Pipeline& pipeline, StageTurn& turn) {
  if (slot.task.kind == TaskKind::gemm1) consume_gemm1<kSplit>(call, slot, work, pipeline, turn);
  else consume_gemm2<kSplit>(call, slot, work, pipeline, turn);
}

// ---- Publishing, by a warp of its own: a release waits for the stores of the whole block, the matrix units must not ----
DEVICE void publish_task(const Call& call, const Task& task) {
  WarpGroup warp;
  if (task.kind == TaskKind::gemm1) {
    if (warp.lane == 0) publish_gemm1(call, task);
  } else {
    bool finisher = false;
    if (warp.lane == 0) finisher = publish_gemm2(call, task);
    if (warp.any(finisher)) return_rows(warp, call, task.block, 0, int(task.block.rows));
  }
}
