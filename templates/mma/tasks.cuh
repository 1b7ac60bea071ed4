// ---- The two GEMM tasks ----------------------------------------------------------------------------------------------
constexpr int kWorkBytes = ${plan.work_bytes};  // of dynamic shared memory: the stages, then a staged tile
constexpr int kSharedBytes = ${plan.shared_bytes};
static_assert(kStages * kStageBytes <= kWorkBytes);

// In dynamic shared memory behind the work: slots for a task and its M-block's rows, resolved by the fetcher warp while the MMA
// warps run the task before.
//% for struct in block_structs
${struct.cpp}
//% endfor
static_assert(kWorkBytes % 128 == 0 && kWorkBytes + sizeof(BlockState) == kSharedBytes);

DEVICE void keep_row(TaskSlot& slot, const Task& task, int r, const Call& call, const Row& row) {
  const void* const place = task.kind == TaskKind::gemm1 ? static_cast<const void*>(input_row(call, row)) : output_row(call, row);
  slot.row[r] = static_cast<const char*>(place);
}

// ---- Epilogue: staged in shared memory, stored in 16-byte vectors ----
template <int kColumns>
struct Staging {
  // The padding puts the 8 rows that a warp writes at once into different banks.
  static constexpr int kStride = (kColumns + 8) * int(sizeof(Element));
  static_assert(kStride % 16 == 0 && kBlockM * kStride <= kWorkBytes);
  char* bytes;

  DEVICE void put(int row, int column, Pair pair) const {
    *reinterpret_cast<Pair*>(bytes + row * kStride + column * int(sizeof(Element))) = pair;
  }
  // The task's columns of its rows, as far as a row of kWidth reaches.
  template <int kWidth, class To>
  DEVICE void store(int rows, int first, To to) const {
    constexpr int kVectors = kColumns / kVector;
    for (int i = int(thread_index()); i < rows * kVectors; i += kMmaThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector;
      if (first + column >= kWidth) continue;
      const uint4 vector = *reinterpret_cast<const uint4*>(bytes + row * kStride + column * int(sizeof(Element)));
      *reinterpret_cast<uint4*>(to(row) + (first + column) * int(sizeof(Element))) = vector;
    }
  }
};

// ---- GEMM1 ----
// Gate and up of a column meet in one lane: atoms alternate, 8 columns of gate, the same 8 of up.
DEVICE WeightLoader gemm1_weights(const MoEArgs& args, u64 expert, int first) {
  const int n = int(loader_row());
  const Weight* const up = row_at(args.up, expert, args.up_expert_stride);
  if constexpr (!kGated) return WeightLoader(up, args.up_row_stride, first + n, kRowsPerPass, kIntermediate);
  const bool is_gate = n / 8 % 2 == 0;
  const Weight* const matrix = is_gate ? row_at(args.gate, expert, args.gate_expert_stride) : up;
  return WeightLoader(matrix, is_gate ? args.gate_row_stride : args.up_row_stride, first + n / 16 * 8 + n % 8, kRowsPerPass / 2,
                      kIntermediate);
}

DEVICE void gemm1_epilogue(const MoEArgs& args, const TaskSlot& slot, const Sums& sums,
                           const Staging<kIntermediateColumns>& staging) {
  constexpr int kAtoms = kGated ? 2 : 1;  // that make 8 columns of the intermediate
  const u32 expert = slot.task.block.expert_slot;
  const int lane = threadIdx.x % 32;
  const int first = int(slot.task.column) * kIntermediateColumns;
#pragma unroll
  for (int n = 0; n < kAtomsN; n += kAtoms) {
    const int column = (Sums::first_column() + n * 8) / kAtoms + lane % 4 * 2;
    Acc gate_bias[2], up_bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = first + column + i;
      gate_bias[i] = Acc(0);
      if constexpr (kGated)
        gate_bias[i] = bias_at(args.gate_bias, args.gate_bias_expert_stride, args.gate_bias_stride, expert, c, kIntermediate);
      up_bias[i] = bias_at(args.up_bias, args.up_bias_expert_stride, args.up_bias_stride, expert, c, kIntermediate);
    }
#pragma unroll
    for (int m = 0; m < kAtomsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Sums::first_row() + m * 16 + half * 8 + lane / 4;
        const Acc weight = kWeightOnInput ? Acc(slot.weight[row]) : Acc(1);
        const Acc* const gate = &sums.atom[m][n][half * 2];
        const Acc* const up = &sums.atom[m][n + kAtoms - 1][half * 2];
        staging.put(row, column, intermediate_pair(gate, up, gate_bias, up_bias, weight));
      }
    }
  }
}

// Columns [column * kIntermediateColumns, ...) of the intermediate.
DEVICE void gemm1_tile(const Call& call, const TaskSlot& slot, char* work) {
  const MoEArgs& args = call.args;
  const Task& task = slot.task;  // read again behind the products, which need the registers
  const Span span(call, Work::gemm1, threadIdx.x == 0, task.serial, task.column);
  const int rows = int(task.block.rows);
  const int first = int(task.column) * kIntermediateColumns;
  const RowLoader tokens(args.x, [&](int r) { return r < rows ? slot.row[r] : nullptr; });
  const WeightLoader weights = gemm1_weights(args, task.block.expert_slot, first);
  Sums sums;
  multiply_tile<kHidden>(sums, tokens, weights, shared_address(work), [](int) {});
  const Staging<kIntermediateColumns> staging{work};
  gemm1_epilogue(args, slot, sums, staging);
  sync_mma();
  char* const block = reinterpret_cast<char*>(intermediate_row(call, task.serial, 0));
  staging.store<kIntermediate>(rows, first, [&](int r) { return block + r * kMiddleRowBytes; });
  sync_mma();  // everyone's stores are before the release in publish_tile()
  if (threadIdx.x == 0) publish_tile(call, task);
}

// ---- GEMM2 ----
DEVICE void gemm2_epilogue(const MoEArgs& args, const Task& task, const float* weights, const Sums& sums,
                           const Staging<kBlockN>& staging) {
  const int lane = threadIdx.x % 32;
  const int first = int(task.column) * kBlockN;
#pragma unroll
  for (int n = 0; n < kAtomsN; ++n) {
    const int column = Sums::first_column() + n * 8 + lane % 4 * 2;
    Acc bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bias[i] = bias_at(args.down_bias, args.down_bias_expert_stride, args.down_bias_stride, task.block.expert_slot,
                        first + column + i, kHidden);
#pragma unroll
    for (int m = 0; m < kAtomsM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Sums::first_row() + m * 16 + half * 8 + lane / 4;
        const Acc weight = kWeightOnRow ? Acc(weights[row]) : Acc(1);
        staging.put(row, column, row_pair(&sums.atom[m][n][half * 2], bias, weight));
      }
  }
}

// Columns [column * kBlockN, ...) of the expert's result.
DEVICE void gemm2_tile(const Call& call, const TaskSlot& slot, char* work) {
  const MoEArgs& args = call.args;
  const Task& task = slot.task;  // read again behind the products, which need the registers
  const Span span(call, Work::gemm2, threadIdx.x == 0, task.serial, task.column);
  const int rows = int(task.block.rows);
  const int first = int(task.column) * kBlockN;
  const char* const block = reinterpret_cast<const char*>(intermediate_row(call, task.serial, 0));
  const RowLoader tokens(block, [&](int r) { return r < rows ? block + r * kMiddleRowBytes : nullptr; });
  const WeightLoader weights(row_at(args.down, task.block.expert_slot, args.down_expert_stride), args.down_row_stride,
                                   first + int(loader_row()), kRowsPerPass, kHidden);
  FinishedTiles finished{call, task.serial};
  Sums sums;
  multiply_tile<kIntermediate>(sums, tokens, weights, shared_address(work), [&](int step) {
    const int begin = step * kBlockK, end = begin + kBlockK < kIntermediate ? begin + kBlockK : kIntermediate;
    for (int part = begin / kPartColumns; part * kPartColumns < end; ++part) finished.wait(u32(part));
  });
  if (bar_red_or(kMmaBarrier, kMmaThreads, finished.aborted)) return;
  const Staging<kBlockN> staging{work};
  gemm2_epilogue(args, task, slot.weight, sums, staging);
  sync_mma();
  staging.store<kHidden>(rows, first, [&](int r) { return const_cast<char*>(slot.row[r]); });
  sync_mma();  // everyone's stores are before the release in finish_tile()
  const bool finisher = threadIdx.x == 0 && finish_tile(call, task);
  if (!bar_red_or(kMmaBarrier, kMmaThreads, finisher)) return;
  WarpGroup warp;  // all tiles of the M-block are before this barrier: each warp returns its share of the rows
  const int share = int(threadIdx.x) / 32, all = int(task.block.rows);
  return_rows(warp, call, task.block, all * share / kMmaWarps, all * (share + 1) / kMmaWarps);
}
