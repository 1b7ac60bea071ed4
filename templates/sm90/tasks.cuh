// ---- The two GEMM tasks, each as its loaders and its consumers see it ---------------------------------------------------
constexpr int kWorkBytes = ${plan.work_bytes};  // of dynamic shared memory: the stages, then a patch per consumer warp
constexpr int kSharedBytes = ${plan.shared_bytes};

// A task and its M-block's rows, resolved by the fetch warp while the task before runs.
struct TaskSlot {
  Task task;
  u32 spoiled;                   // an abort left rows that must not be published; set before the last stage is full
  float weight[kBlockM];         // of the route
  const Element* from[kBlockM];  // GEMM1: the input row
  Element* to[kBlockM];          // GEMM1: of the intermediate, GEMM2: where the result goes
};

struct Maps {
  const TensorMap* gate;
  const TensorMap* up;
  const TensorMap* down;
  const TensorMap* ring;

  DEVICE void prefetch() const {
    if constexpr (kGated) prefetch_tensormap(gate);
    prefetch_tensormap(up);
    prefetch_tensormap(down);
    prefetch_tensormap(ring);
  }
};

// A constant where no tile is ever split.
DEVICE bool is_split(const Task& task) { return kSplitRows > 0 && task.share == Share::columns; }

// One lane of each consumer warpgroup records what the warpgroup does.
DEVICE Span span_of(const Call& call, Work work, const Task& task) {
  return Span(call, work, threadIdx.x % 128 == 0, task.issue, task.column);
}

// In a trace, the wait for the first stage of a task stands apart from its products.
DEVICE void trace_fill(const Call& call, const Task& task, const Pipeline& pipeline, const StageTurn& turn) {
  if constexpr (kTrace) {
    const Span span = span_of(call, Work::fill, task);
    pipeline.wait_full(turn);
  }
}

// ---- Loading weights ----
// What a task needs of rows [row, row + kRows) of a weight matrix, into a stage. A box has kRows / kCluster: all of a split
// tile; each block of the cluster loads one for all when they multiply the same weights, else all for itself. Past the matrix,
// where a member without a tile is altogether, TMA writes zeros and reads nothing.
template <bool kSplit, int kRows>
DEVICE void load_weight_rows(u32 to, const TensorMap* map, u32 full, int k, int row, const Task& task, u64 policy) {
  constexpr int kBoxRows = kRows / kCluster;
  const int mine = int(cluster_ctarank()) * kBoxRows, expert = int(task.block.expert_slot);
  if (kSplit) {
    cp_async_bulk_tensor_3d(to, map, full, k, row + mine, expert, policy);
  } else if (kCluster > 1 && task.share == Share::rows) {
    cp_async_bulk_tensor_3d_multicast(to + mine * kRowBytes, map, full, k, row + mine, expert, (1 << kCluster) - 1, policy);
  } else {
#pragma unroll
    for (int first = 0; first < kRows; first += kBoxRows)
      cp_async_bulk_tensor_3d(to + first * kRowBytes, map, full, k, row + first, expert, policy);
  }
}

template <bool kSplit, class NearEnd>
DEVICE void load_task_weights(
    const Call& call, const Maps& maps, const Task& task, const Pipeline& pipeline, StageTurn& turn, NearEnd near_end) {
  const Span span(call, Work::weights, true, task.issue, task.column);
  // Weights that are read once should not drive rows, results and this code out of L2.
  const u64 policy = task.once ? createpolicy_evict_first() : createpolicy_evict_normal();
  if (task.kind == TaskKind::gemm1) {
    const int first = int(task.column) * kIntermediateColumns;
    const auto load = [&](u32 to, u32 full, int k) {
      // All gate rows, then all up rows: one thread gets gate and up of a column half a tile apart.
      if constexpr (kGated) load_weight_rows<kSplit, kIntermediateColumns>(to, maps.gate, full, k, first, task, policy);
      load_weight_rows<kSplit, kIntermediateColumns>(
          to + (kGated ? Shape<kSplit>::kStepWeightBytes / 2 : 0), maps.up, full, k, first, task, policy);
    };
    load_weights<kSplit, kHidden>(pipeline, turn, load, near_end);
  } else {
    const int first = int(task.column) * kBlockN;
    const auto load = [&](u32 to, u32 full, int k) {
      load_weight_rows<kSplit, kBlockN>(to, maps.down, full, k, first, task, policy);
    };
    load_weights<kSplit, kIntermediate>(pipeline, turn, load, near_end);
  }
}

// ---- Loading rows ----
// GEMM1: from anywhere.
template <bool kSplit>
DEVICE void gather_input(const TaskSlot& slot, const Pipeline& pipeline, StageTurn& turn) {
  RowGather gather(threadIdx.x % 32, slot.from, int(slot.task.block.rows));
  gather_rows<kSplit, kHidden>(pipeline, turn, gather);
}

// GEMM2: the rows of an M-block follow each other in the ring, so TMA brings them, kRingRows at a time.
constexpr u32 kRingRows = ${plan.ring_box};

template <bool kSplit>
DEVICE void load_intermediate(const Call& call, const Maps& maps, TaskSlot& slot, const Pipeline& pipeline, StageTurn& turn) {
  using Tile = Shape<kSplit>;
  const u32 rows = slot.task.block.rows;
  const int place = int(slot.task.issue % u32(call.args.ring_slots));
  FinishedTiles finished{call, slot.task.issue};
#pragma unroll 1
  for (int step = 0; step < Tile::template kSteps<kIntermediate>; ++step) {
    const int begin = step * Tile::kStageK, end = begin + Tile::kStageK < kIntermediate ? begin + Tile::kStageK : kIntermediate;
    bool acquired = false;
    for (int part = begin / kPartColumns; part * kPartColumns < end; ++part) acquired |= finished.wait(u32(part));
    if (finished.aborted) slot.spoiled = 1;
    pipeline.wait_empty(turn);
    if (threadIdx.x % 32 == 0) {
      if (acquired) fence_proxy_async_global();  // ordinary stores of other blocks, acquired by this thread, are read by TMA
      const u32 boxes = (rows + kRingRows - 1) / kRingRows;
      mbarrier_arrive_expect_tx(pipeline.full(turn), boxes * Tile::kParts * kRingRows * kRowBytes);
      for (int part = 0; part < Tile::kParts; ++part) {
        const u32 to = pipeline.rows(turn) + part * Tile::kStepRowBytes;
        for (u32 row = 0; row < rows; row += kRingRows)
          cp_async_bulk_tensor_3d(to + row * kRowBytes, maps.ring, pipeline.full(turn), begin + part * kBlockK, int(row), place,
                                  createpolicy_evict_normal());
      }
    }
    turn.advance();
  }
}

template <bool kSplit>
DEVICE void load_task_rows(const Call& call, const Maps& maps, TaskSlot& slot, const Pipeline& pipeline, StageTurn& turn) {
  const Span span(call, Work::gather, threadIdx.x % 32 == 0, slot.task.issue, slot.task.column);
  if (slot.task.kind == TaskKind::gemm1) gather_input<kSplit>(slot, pipeline, turn);
  else load_intermediate<kSplit>(call, maps, slot, pipeline, turn);
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
  const auto element = [&](int column, int index) {
    const int c = first + column;
    return sums.value[index] + bias_at(args.down_bias, args.down_bias_expert_stride, args.down_bias_stride, expert, c, kHidden);
  };
  store_tile<Sums<kSplit>::kColumns, kHidden>(
      patch, slot, first,
      [&](int column, int index, int) { return pair_of(element(column, index), element(column + 1, index + 1)); });
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
