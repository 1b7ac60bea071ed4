// ---- Loading: what a task brings into the stages, step by step -------------------------------------------------------
DEVICE void keep_row(TaskSlot& slot, const Task& task, int r, const Call& call, const Row& row) {
  const bool first = task.kind == TaskKind::gemm1;
  if (first) slot.from[r] = reinterpret_cast<const char*>(input_row(call, row));
  void* const to = first ? static_cast<void*>(intermediate_row(call, task.serial, r)) : output_row(call, row);
  slot.to[r] = static_cast<char*>(to);
}

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
  const Span span(call, Work::weights, true, task.serial, task.column);
  // Weights that are read once should not drive rows, results and this code out of L2.
  const u64 policy = task.once ? createpolicy_evict_first() : createpolicy_evict_normal();
  if (task.kind == TaskKind::gemm1) {
    const int first = int(task.column) * kIntermediateColumns;
    const auto load = [&](u32 to, u32 full, int k) {
      // All gate rows, then all up rows: one thread gets gate and up of a column half a tile apart.
      if constexpr (kGated) load_weight_rows<kSplit, kIntermediateColumns>(to, maps.gate, full, k, first, task, policy);
      load_weight_rows<kSplit, kIntermediateColumns>(
          to + (kGated ? Shape<kSplit>::template kStepBytes<WeightOperand> / 2 : 0), maps.up, full, k, first, task, policy);
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
  const int place = int(slot.task.serial % u32(call.args.ring_slots));
  FinishedTiles finished{call, slot.task.serial};
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
      mbarrier_arrive_expect_tx(pipeline.full(turn), boxes * Tile::kStageSteps * kRingRows * kRowBytes);
      for (int i = 0; i < Tile::kStageSteps; ++i) {
        const u32 to = pipeline.tile<TokenOperand>(turn) + i * Tile::template kStepBytes<TokenOperand>;
        for (u32 row = 0; row < rows; row += kRingRows)
          cp_async_bulk_tensor_3d(to + row * kRowBytes, maps.ring, pipeline.full(turn), begin + i * kBlockK, int(row), place,
                                  createpolicy_evict_normal());
      }
    }
    turn.advance();
  }
}

template <bool kSplit>
DEVICE void load_task_rows(const Call& call, const Maps& maps, TaskSlot& slot, const Pipeline& pipeline, StageTurn& turn) {
  const Span span(call, Work::gather, threadIdx.x % 32 == 0, slot.task.serial, slot.task.column);
  if (slot.task.kind == TaskKind::gemm1) gather_input<kSplit>(slot, pipeline, turn);
  else load_intermediate<kSplit>(call, maps, slot, pipeline, turn);
}
