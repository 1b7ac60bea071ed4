// ---- The two GEMM tasks as their consumers see them, and how they are published -----------------------------------------
// One lane of each consumer warpgroup records what the warpgroup does; a member past the last tile does nothing.
DEVICE Span span_of(const Call& call, Work work, const Task& task) {
  return Span(call, work, threadIdx.x % 128 == 0 && task.block.rows != 0, task.serial, task.column);
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
  static constexpr int kVectors = kColumns / kVector, kStep = 32 / kVectors, kLaneVectors = 16 / kStep;
  DEVICE static int row(int i) { return int(threadIdx.x % 32) / kVectors + i * kStep; }
  DEVICE static int column() { return int(threadIdx.x % 32) % kVectors * kVector; }

  DEVICE uint4 vector(int i) const {
    return *reinterpret_cast<const uint4*>(bytes + row(i) * kStride + column() * int(sizeof(Element)));
  }

  // The padding of a row has room for the biases of 8 columns: rows 0 to 7 for those of one matrix, the others for a second's.
  DEVICE Bias* biases(int matrix, int column) const {
    return reinterpret_cast<Bias*>(bytes + (matrix * 8 + column / 8) * kStride + kColumns * int(sizeof(Element))) + column % 8;
  }
  // Of two neighbours; `pair` stays what it is where there are none.
  DEVICE void read_biases(int matrix, int column, Acc (&pair)[2]) const {
    if constexpr (!kBias) return;
    const Bias* const from = biases(matrix, column % kColumns);
#pragma unroll
    for (int i = 0; i < 2; ++i) pair[i] = to_acc(from[i]);
  }
};
static_assert(kStages * kStageBytes + kConsumerWarps * Patch::kBytes <= kWorkBytes);
constexpr int kMostParts = kSplitRows > 0 ? kCluster : 1;
static_assert(kBlockN / kMostParts % Patch::kColumns == 0 && kIntermediateColumns / kMostParts % Patch::kColumns == 0);

DEVICE int first_row() { return (int(threadIdx.x) / 32 - 4) * 16; }  // of this warp in the M-block
DEVICE Patch my_patch(char* work) { return {work + kStages * kStageBytes + (threadIdx.x / 32 - 4) * Patch::kBytes}; }

// The biases of an expert's matrix.
struct Biases {
  const Bias* from;
  long long stride;  // bytes

  DEVICE Biases(const Bias* all, long long expert_stride, long long of_column, const TaskSlot& slot)
      : from(row_at(all, slot.task.block.expert_slot, expert_stride)), stride(of_column) {}
  // Those of two columns, of which a matrix has both or none, into shared memory: all lanes need them, in every row.
  DEVICE void fetch_pair(Bias* to, int column, int width) const {
    const Bias none = from_acc(Acc(0));
    to[0] = column < width ? *row_at(from, column, stride) : none;
    to[1] = column < width ? *row_at(from, column + 1, stride) : none;
  }
};

// pair(column, index, half) makes two neighbours of row lane / 4 + 8 half from the sums at `index` on; `column` is in the tile.
template <int kColumns, int kWidth, int kMatrices, class MakePair>
DEVICE void store_tile(
    const Patch& patch, const TaskSlot& slot, int first, const Biases* biases, MakePair make_pair) {
  const int rows = int(slot.task.block.rows) - first_row();
  const int lane = int(threadIdx.x % 32);
  char* to[Patch::kLaneVectors];  // read before the first store: the compiler cannot know that none changes them
#pragma unroll
  for (int i = 0; i < Patch::kLaneVectors; ++i)
    to[i] = slot.to[first_row() + Patch::row(i)] + (first + Patch::column()) * int(sizeof(Element));
#pragma unroll
  for (int piece = 0; piece < kColumns; piece += Patch::kColumns) {
    if constexpr (kBias) {
#pragma unroll
      for (int i = 0; i < kMatrices; ++i)
        biases[i].fetch_pair(patch.biases(i, lane * 2), first + piece + lane * 2, kWidth);
      __syncwarp();
    }
#pragma unroll
    for (int column = 0; column < Patch::kColumns; column += 8) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        patch.put(lane / 4 + half * 8, column + lane % 4 * 2,
                  make_pair(piece + column + lane % 4 * 2, (piece + column) / 2 + half * 2, half));
    }
    __syncwarp();
    uint4 vector[Patch::kLaneVectors];
#pragma unroll
    for (int i = 0; i < Patch::kLaneVectors; ++i) vector[i] = patch.vector(i);
    __syncwarp();
    const bool inside = first + piece + Patch::column() < kWidth;
#pragma unroll
    for (int i = 0; i < Patch::kLaneVectors; ++i)
      if (inside && Patch::row(i) < rows) *reinterpret_cast<uint4*>(to[i] + piece * int(sizeof(Element))) = vector[i];
  }
}

// ---- GEMM1: a tile of the intermediate ----
template <bool kSplit>
DEVICE void gemm1_epilogue(const MoEArgs& args, const TaskSlot& slot, const Sums<kSplit>& sums, const Patch& patch) {
  constexpr int kColumns = kIntermediateColumns / Shape<kSplit>::kParts;
  const int first = first_column(slot.task, kIntermediateColumns);
  const int lane = int(threadIdx.x % 32);
  const float weight[2] = {slot.weight[first_row() + lane / 4], slot.weight[first_row() + lane / 4 + 8]};
  const auto make_pair = [&](int column, int index, int half) {
    Acc gate_bias[2] = {}, up_bias[2] = {};
    patch.read_biases(0, column, up_bias);
    if constexpr (kGated) patch.read_biases(1, column, gate_bias);
    const Acc* const gate = &sums.value[index];
    return intermediate_pair(gate, gate + (kGated ? Sums<kSplit>::kColumns / 4 : 0), gate_bias, up_bias,
                             kWeightOnInput ? weight[half] : Acc(1));
  };
  const Biases biases[] = {Biases(args.up_bias, args.up_bias_expert_stride, args.up_bias_stride, slot),
                           Biases(args.gate_bias, args.gate_bias_expert_stride, args.gate_bias_stride, slot)};
  store_tile<kColumns, kIntermediate, kGated ? 2 : 1>(patch, slot, first, biases, make_pair);
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
  const int first = first_column(slot.task, kBlockN);
  const int lane = int(threadIdx.x % 32);
  const float weight[2] = {slot.weight[first_row() + lane / 4], slot.weight[first_row() + lane / 4 + 8]};
  const auto make_pair = [&](int column, int index, int half) {
    Acc bias[2] = {};
    patch.read_biases(0, column, bias);
    return row_pair(&sums.value[index], bias, kWeightOnRow ? weight[half] : Acc(1));
  };
  const Biases biases[] = {Biases(args.down_bias, args.down_bias_expert_stride, args.down_bias_stride, slot)};
  store_tile<Sums<kSplit>::kColumns, kHidden, 1>(patch, slot, first, biases, make_pair);
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
    if (warp.lane == 0) publish_tile(call, task);
  } else {
    bool finisher = false;
    if (warp.lane == 0) finisher = finish_tile(call, task);
    if (warp.any(finisher)) return_rows(warp, call, task.block, 0, int(task.block.rows));
  }
}
