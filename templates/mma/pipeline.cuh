// ---- The k loop: cp.async stages in shared memory, one barrier of the MMA warps per stage --------------------------------
constexpr int kStages = ${tile.stages};
constexpr int kWarpsM = ${tile.warps_m};
constexpr int kWarpsN = ${tile.warps_n};
constexpr int kMmaWarps = kWarpsM * kWarpsN;
constexpr int kMmaThreads = kMmaWarps * 32;  // the first threads of the block
constexpr u32 kMmaBarrier = 1;               // barrier 0 is __syncthreads()
constexpr int kThreads = ${plan.threads};
static_assert(kThreads == kMmaThreads + 32);

static_assert(OperandA::kTokens && !OperandB::kTokens, "the epilogues have a token in every row");

constexpr int kChunks = kRowBytes / 16;
constexpr int kRowsPerPass = kMmaThreads / kChunks;  // one 16-byte chunk per thread and pass
static_assert(kRowsPerPass % 16 == 0, "all rows of a thread have one swizzle, and are all gate or all up");

constexpr int kAtomsM = OperandA::kRows / kWarpsM / 16;  // of one warp
constexpr int kAtomsN = OperandB::kRows / kWarpsN / 8;
static_assert(kAtomsN % 2 == 0);

DEVICE void sync_mma() { bar_sync(kMmaBarrier, kMmaThreads); }

// A thread loads the same chunk of every kRowsPerPass-th row of an operand.
DEVICE u32 loader_row() { return threadIdx.x / kChunks; }
DEVICE u32 loader_byte() { return threadIdx.x % kChunks * 16; }
DEVICE u32 loader_place() { return loader_row() * kRowBytes + (loader_byte() ^ swizzle<kRowBytes>(loader_row()) * 16); }

// Whether a pass of kRows rows reaches this thread at all, and whether a step of kDepth elements does.
template <int kRows>
DEVICE bool has_row(int pass) {
  return kRows % kRowsPerPass == 0 || int(loader_row()) + pass * kRowsPerPass < kRows;
}
template <int kDepth>
DEVICE bool inside_row(int step) {
  constexpr u32 kBytes = kDepth * sizeof(Element);
  return kBytes % kRowBytes == 0 || u32(step) * kRowBytes + loader_byte() < kBytes;
}

// Rows anywhere in memory; absent ones are zeros in shared memory.
struct RowLoader {
  static constexpr int kPasses = (TokenOperand::kRows + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(kPasses <= 32);
  const char* from[kPasses];
  u32 present = 0;  // bit per pass

  // locate(row) is where a row starts, null when it is absent; `anywhere` is an address to name without reading it.
  template <class Locate>
  DEVICE RowLoader(const void* anywhere, Locate locate) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const void* const start = has_row<TokenOperand::kRows>(pass) ? locate(int(loader_row()) + pass * kRowsPerPass) : nullptr;
      present |= u32(start != nullptr) << pass;
      from[pass] = static_cast<const char*>(start != nullptr ? start : anywhere) + loader_byte();
    }
  }
  template <int kDepth>
  DEVICE void load(u32 stage, int step) const {
    const bool inside = inside_row<kDepth>(step);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!has_row<TokenOperand::kRows>(pass)) continue;
      const bool wanted = inside && (present >> pass & 1) != 0;
      const char* const source = from[pass] + (wanted ? step * kRowBytes : 0);
      cp_async_16(stage + TokenOperand::kAt + loader_place() + pass * kRowsPerPass * kRowBytes, source, wanted ? 16 : 0);
    }
  }
};

// Rows of a weight matrix: pass p reads row first + p * step, absent from row `count` on.
struct WeightLoader {
  static constexpr int kPasses = (WeightOperand::kRows + kRowsPerPass - 1) / kRowsPerPass;
  const char* from;
  long long pass_bytes;
  int present;  // leading passes

  DEVICE WeightLoader(const Weight* matrix, long long row_bytes, int first, int step, int count) {
    present = first < count ? (count - first + step - 1) / step : 0;
    from = reinterpret_cast<const char*>(row_at(matrix, present > 0 ? first : 0, row_bytes)) + loader_byte();
    pass_bytes = step * row_bytes;
  }
  template <int kDepth>
  DEVICE void load(u32 stage, int step) const {
    const bool inside = inside_row<kDepth>(step);
    const u32 to = stage + WeightOperand::kAt + loader_place();
    const char* source = from + step * kRowBytes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!has_row<WeightOperand::kRows>(pass)) continue;
      const bool wanted = inside && pass < present;
      cp_async_16(to + pass * kRowsPerPass * kRowBytes, wanted ? source : from, wanted ? 16 : 0);
      source += pass_bytes;  // a running sum: as separate addresses the passes would cost two registers each
    }
  }
};

// The sums of one warp: kAtomsM x kAtomsN atoms of its part of the tile.
struct Sums {
  Accumulator atom[kAtomsM][kAtomsN];

  DEVICE static int first_row() { return int(threadIdx.x) / 32 % kWarpsM * (kAtomsM * 16); }
  DEVICE static int first_column() { return int(threadIdx.x) / 32 / kWarpsM * (kAtomsN * 8); }

  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kAtomsM; ++m)
#pragma unroll
      for (int n = 0; n < kAtomsN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) atom[m][n][i] = Acc(0);
  }
};

template <class PlaceA, class PlaceB>
DEVICE void multiply_stage(Sums& sums, u32 tile_a, u32 tile_b, const PlaceA& place_a, const PlaceB& place_b) {
#pragma unroll kUnrolledSteps
  for (int step = 0; step < kRowBytes; step += kStepBytes) {
    RowFragment a[kAtomsM];
#pragma unroll
    for (int m = 0; m < kAtomsM; ++m) load_rows(a[m], place_a, tile_a, m * 16, step);
#pragma unroll
    for (int n = 0; n < kAtomsN; n += 2) {
      ColumnFragment b;
      load_columns(b, place_b, tile_b, n * 8, step);
#pragma unroll
      for (int m = 0; m < kAtomsM; ++m) {
        multiply<0>(sums.atom[m][n], a[m], b);
        multiply<1>(sums.atom[m][n + 1], a[m], b);
      }
    }
  }
}

// sums = A . B over kDepth elements. ready(step) returns when the token chunks of a step may be read; for weights nobody has to
// wait. All MMA threads call this; the stages are free again when it returns.
template <int kDepth, class Ready>
DEVICE void multiply_tile(Sums& sums, const RowLoader& tokens, const WeightLoader& weights, u32 stages, Ready ready) {
  constexpr int kSteps = (kDepth + kBlockK - 1) / kBlockK;
  const auto load = [&](int step, u32 slot) {
    if (step < kSteps) {
      const u32 stage = stages + slot * kStageBytes;
      weights.template load<kDepth>(stage, step);
      ready(step);
      tokens.template load<kDepth>(stage, step);
    }
    cp_async_commit_group();  // an empty group too: wait_group counts
  };
  sums.clear();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step, step);
  const u32 lane = threadIdx.x % 32;
  const auto place_a = row_place<kRowBytes>(lane);
  const auto place_b = column_place<kRowBytes>(lane);
  const u32 tile_a = stages + OperandA::kAt + Sums::first_row() * kRowBytes;
  const u32 tile_b = stages + OperandB::kAt + Sums::first_column() * kRowBytes;
  u32 slot = 0;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    cp_async_wait_group<kStages - 2>();  // my part of this step is here
    sync_mma();                          // so is everyone's, and nobody reads the slot that the next load fills
    load(step + kStages - 1, slot == 0 ? kStages - 1 : slot - 1);
    multiply_stage(sums, tile_a + slot * kStageBytes, tile_b + slot * kStageBytes, place_a, place_b);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  cp_async_wait_group<0>();
  sync_mma();
}
