// ---- Block program of the router --------------------------------------------------------------------------------------
// An operand of the matrix units is 16 bytes: lane l has those of row l / 4 at the same k on both sides, and both are cut in
// the same way. The "k" of an operand is then a permutation of the real one, and needs no ldmatrix.
//
// One order of sums for every call: a step is 128 bytes of k, in two chunks of 64, and kSliceSteps neighbouring steps make a
// slice. A slice adds its first chunks in ascending order, and apart from them its second ones; each of the two sums is added
// up over the slices, in their order, and at last they meet. The tiles, which suit few and many tokens, only share the work
// in different ways: a narrow one gives each warp a slice, a wide one gives the first four warps the first chunks. So a
// token's bits depend neither on the number of tokens nor on its place among them.
constexpr int kThreads = ${plan.threads};
constexpr int kWarps = kThreads / 32;
constexpr u32 kSharedBytes = ${plan.shared_bytes};
constexpr int kFragmentTokens = kBlockTokens;
constexpr int kFragmentExperts = ${plan.block_experts};
constexpr int kChunk = 64 / int(sizeof(Element));  // elements of a row
constexpr int kSteps = (kHidden + 2 * kChunk - 1) / (2 * kChunk);
constexpr int kSliceSteps = (kSteps + kWarps - 1) / kWarps;

// One fragment of sums: a lane has tokens g = lane / 4 and g + 8 at experts 2 (lane % 4) and the next.
struct alignas(16) Sums {
  Acc value[4];

  DEVICE void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += other.value[i];
  }
};
struct Operand {
  u32 word[4];

  DEVICE explicit Operand(const uint4& bits) : word{bits.x, bits.y, bits.z, bits.w} {}
};

//% if spec.dtype == "float64"
using Factor = Operand;
DEVICE double double_of(const Factor& a, int i) { return __hiloint2double(int(a.word[2 * i + 1]), int(a.word[2 * i])); }
DEVICE void multiply(Sums& c, const Factor& low, const Factor& high, const Factor& b) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mma_m8n8k4_f64(c.value[0], c.value[1], double_of(low, i), double_of(b, i));
    mma_m8n8k4_f64(c.value[2], c.value[3], double_of(high, i), double_of(b, i));
  }
}
//% elif spec.dtype == "float32"
// An fp32 operand is the sum of two tf32 numbers up to 2^-22 of it: three products make an fp32 router of the tf32 unit,
// whose own rounding of the operands would swap experts. The unit truncates its sums: keep them short, and add them here.
struct Factor {
  u32 big[4], small[4];

  DEVICE explicit Factor(const Operand& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      big[i] = cvt_rna_tf32_f32(a.word[i]);
      small[i] = cvt_rna_tf32_f32(__float_as_uint(__uint_as_float(a.word[i]) - __uint_as_float(big[i])));
    }
  }
};
DEVICE void multiply_step(float (&c)[4], const u32 (&low)[4], const u32 (&high)[4], const u32 (&b)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) mma_m16n8k8_tf32(c, {low[i], high[i], low[i + 1], high[i + 1]}, b[i], b[i + 1]);
}
DEVICE void multiply(Sums& c, const Factor& low, const Factor& high, const Factor& b) {
  float part[4] = {};
  multiply_step(part, low.small, high.small, b.big);
  multiply_step(part, low.big, high.big, b.small);
  multiply_step(part, low.big, high.big, b.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) c.value[i] += part[i];
}
//% else
using Factor = Operand;
DEVICE void multiply_step(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  ${"mma_m16n8k16_bf16" if spec.dtype == "bfloat16" else "mma_m16n8k16_f16"}(c, a, b0, b1);
}
DEVICE void multiply(Sums& c, const Factor& low, const Factor& high, const Factor& b) {
#pragma unroll
  for (int i = 0; i < 4; i += 2)
    multiply_step(c.value, {low.word[i], high.word[i], low.word[i + 1], high.word[i + 1]}, b.word[i], b.word[i + 1]);
}
//% endif

struct SelectGroup : WarpGroup {
  DEVICE int argmax(u32 key, int index) const {
    const u32 best = __reduce_max_sync(kAll, key);
    return int(__reduce_min_sync(kAll, key == best ? u32(index) : ~0u));
  }
  DEVICE int argmax(u64 key, int index) const {
    const u32 high = __reduce_max_sync(kAll, u32(key >> 32));
    const bool leads = u32(key >> 32) == high;
    const u32 low = __reduce_max_sync(kAll, leads ? u32(key) : 0u);
    return int(__reduce_min_sync(kAll, leads && u32(key) == low ? u32(index) : ~0u));
  }
  DEVICE Acc sum(Acc value) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
    return value;
  }
};

DEVICE int tiles_of(int count, int tile) { return (count + tile - 1) / tile; }

DEVICE Acc bias_of(const RouterArgs& args, int expert) {
  return args.logit_bias != nullptr ? Acc(args.logit_bias[expert]) : Acc(0);
}

// Logits of one fragment, straight from global memory: for few tokens, where latency is all.
DEVICE void make_narrow(const RouterArgs& args, char* shared, int tokens, int first_token, int first_expert) {
  constexpr int kAhead = sizeof(Element) == 2 ? 4 : 3;  // steps in flight per warp: what registers hold
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row = lane / 4, lane_k = lane % 4 * kVector;
  const bool low_there = first_token + row < tokens, high_there = first_token + row + 8 < tokens;
  const bool expert_there = first_expert + row < args.num_experts;
  const Element* const low = args.x + u64(first_token + row) * kHidden;
  const Element* const high = low + 8 * kHidden;
  const Element* const expert = args.router_weight + u64(first_expert + row) * kHidden;
  const int begin = warp * kSliceSteps;
  const int end = begin + kSliceSteps < kSteps ? begin + kSliceSteps : kSteps;

  uint4 ring[kAhead][2][3];
  const auto load = [&](uint4 (&slot)[2][3], int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = (2 * step + half) * kChunk + lane_k;
      const bool inside = step < end && k < kHidden;  // else zeros
      const auto vector = [&](const Element* from, bool there) {
        return inside && there ? *reinterpret_cast<const uint4*>(from + k) : uint4{0, 0, 0, 0};
      };
      slot[half][0] = vector(low, low_there);
      slot[half][1] = vector(high, high_there);
      slot[half][2] = vector(expert, expert_there);
    }
  };
  Sums sums[2] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ring[i], begin + i);
#pragma unroll 1
  for (int start = begin; start < end; start += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i >= end) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4(&rows)[3] = ring[i][half];
        multiply(sums[half], Factor(Operand(rows[0])), Factor(Operand(rows[1])), Factor(Operand(rows[2])));
      }
      load(ring[i], start + i + kAhead);
    }
  }

  constexpr int kSums = kFragmentTokens * kFragmentExperts;
  using Parts = Acc[kWarps][2][kSums];
  static_assert(sizeof(Parts) <= kSharedBytes && kSums <= kThreads);
  Parts& parts = *reinterpret_cast<Parts*>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) reinterpret_cast<Sums*>(parts[warp][half])[lane] = sums[half];
  __syncthreads();
  const int place = int(threadIdx.x);
  if (place >= kSums) return;
  Acc total[2] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] += parts[w][half][place];
  const int token = first_token + place / 16 + place % 4 / 2 * 8;
  const int column = first_expert + place / 4 % 4 * 2 + place % 2;
  if (token < tokens && column < args.num_experts)
    args.logits[u64(token) * args.num_experts + column] = total[0] + total[1] + bias_of(args, column);
}

// Logits of 32 kSide tokens and as many experts. A stage has a step of the tokens and then of the experts, rows of 128 bytes;
// the two chunks of an odd row are swapped, so that neither stores nor loads meet in a bank.
template <int kSide>
DEVICE void make_wide(const RouterArgs& args, char* shared, int tokens, int first_token, int first_expert) {
  constexpr int kRows = 32 * kSide;
  constexpr u32 kHalfStage = kRows * 128;
  constexpr int kStages = kSharedBytes / (2 * kHalfStage);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  // This thread loads 16 bytes of every 32nd row.
  const int load_row = thread / 8, load_column = thread % 8;
  const u32 load_place = shared_address(shared) + load_row * 128 + (load_column ^ load_row % 2 * 4) * 16;
  const Element* const token_row = args.x + u64(first_token + load_row) * kHidden;
  const Element* const expert_row = args.router_weight + u64(first_expert + load_row) * kHidden;
  const auto load = [&](int step, int slot) {
    const int k = step * 2 * kChunk + load_column * kVector;
    const u32 place = load_place + slot * 2 * kHalfStage;
    if (step < kSteps) {
#pragma unroll
      for (int row = 0; row < kRows; row += 32) {
        const bool token_there = k < kHidden && first_token + load_row + row < tokens;
        const bool expert_there = k < kHidden && first_expert + load_row + row < args.num_experts;
        cp_async_16(place + row * 128, token_there ? token_row + row * kHidden + k : args.x, token_there ? 16 : 0);
        cp_async_16(place + kHalfStage + row * 128, expert_there ? expert_row + row * kHidden + k : args.router_weight,
                    expert_there ? 16 : 0);
      }
    }
    cp_async_commit_group();  // an empty group too: wait_group counts
  };

  // Warps 0 to 3 have the first chunk of a step and warps 4 to 7 the second, each for a quarter of the tile.
  const int half = warp / 4;
  const int warp_token = warp % 2 * 16 * kSide, warp_expert = warp / 2 % 2 * 16 * kSide;
  const int row = lane / 4;
  const char* const lane_place = shared + row * 128 + (half ^ row % 2) * 64 + lane % 4 * 16;
  Sums total[kSide][2 * kSide] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step, step);
  int step = 0, slot = 0;
#pragma unroll 1
  while (step < kSteps) {
    Sums sums[kSide][2 * kSide] = {};
#pragma unroll 1
    for (int end = step + kSliceSteps < kSteps ? step + kSliceSteps : kSteps; step < end; ++step) {
      cp_async_wait_group<kStages - 2>();  // my part of this step is here
      __syncthreads();                     // so is everyone's, and nobody reads the slot that the next load fills
      load(step + kStages - 1, slot == 0 ? kStages - 1 : slot - 1);
      const char* const stage = lane_place + slot * 2 * kHalfStage;
      const auto factor = [&](int at) { return Factor(Operand(*reinterpret_cast<const uint4*>(stage + at * 128))); };
#pragma unroll
      for (int m = 0; m < kSide; ++m) {
        const Factor low = factor(warp_token + m * 16), high = factor(warp_token + m * 16 + 8);
#pragma unroll
        for (int n = 0; n < 2 * kSide; ++n) multiply(sums[m][n], low, high, factor(kRows + warp_expert + n * 8));
      }
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
#pragma unroll
    for (int m = 0; m < kSide; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kSide; ++n) total[m][n].add(sums[m][n]);
  }
  __syncthreads();  // the stages are free: nobody reads them, and the last groups of loads were empty

  // The second chunks of a warp's part meet the first ones.
  using Parts = Sums[kSide][2 * kSide][128];
  static_assert(sizeof(Parts) <= kSharedBytes);
  Parts& parts = *reinterpret_cast<Parts*>(shared);
  const int partner = thread % 128;
  if (half == 1) {
#pragma unroll
    for (int m = 0; m < kSide; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kSide; ++n) parts[m][n][partner] = total[m][n];
  }
  __syncthreads();
  if (half == 1) return;
  const int token = first_token + warp_token + row;
#pragma unroll
  for (int n = 0; n < 2 * kSide; ++n) {
#pragma unroll
    for (int m = 0; m < kSide; ++m) total[m][n].add(parts[m][n][partner]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int expert = first_expert + warp_expert + n * 8 + lane % 4 * 2 + i;
      if (expert >= args.num_experts) continue;
      const Acc bias = bias_of(args, expert);
      Acc* const column = args.logits + u64(token) * args.num_experts + expert;
#pragma unroll
      for (int m = 0; m < 2 * kSide; ++m)
        if (token + m * 8 < tokens) column[u64(m) * 8 * args.num_experts] = total[m / 2][n].value[m % 2 * 2 + i] + bias;
    }
  }
}

// What a kind of tile costs: the rows it reads, times the tiles that the busiest block makes.
DEVICE u64 cost_of(int tokens, int experts, int tile_tokens, int tile_experts) {
  const u32 tiles = tiles_of(tokens, tile_tokens) * tiles_of(experts, tile_experts);
  return u64((tiles + gridDim.x - 1) / gridDim.x) * (tile_tokens + tile_experts);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
${name}(const __grid_constant__ RouterArgs args) {
  extern __shared__ __align__(128) char shared[];
  SelectGroup group;
  const int tokens = token_count(args), experts = args.num_experts;
  int tile_tokens = kFragmentTokens, tile_experts = kFragmentExperts;
#pragma unroll
  for (int side = 32; side <= 64; side *= 2) {
    if (cost_of(tokens, experts, side, side) <= cost_of(tokens, experts, tile_tokens, tile_experts)) {
      tile_tokens = side;
      tile_experts = side;
    }
  }
  const int columns = tiles_of(experts, tile_experts);
  const int tiles = tiles_of(tokens, tile_tokens) * columns;
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    const int band = tile / columns;  // the tokens of one row of tiles
    const int first = band * tile_tokens;
    const int first_expert = tile % columns * tile_experts;
    if (tile_tokens == 64) make_wide<2>(args, shared, tokens, first, first_expert);
    else if (tile_tokens == 32) make_wide<1>(args, shared, tokens, first, first_expert);
    else make_narrow(args, shared, tokens, first, first_expert);
    // The block that finishes the last tile of a band selects for its tokens: after the barrier one addition releases
    // the logits of this block and acquires those of the others.
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      last = fetch_add_acq_rel(args.counters + band, 1u) + 1 == u32(columns);
      if (last) store_relaxed(args.counters + band, 0u);  // as the next call wants it
    }
    if (!__syncthreads_or(last)) continue;
    constexpr int kTogether = sizeof(Acc) == 4 ? 2 : 1;  // tokens of a warp at a time
    const int end = first + tile_tokens < tokens ? first + tile_tokens : tokens;
    for (int token = first + int(threadIdx.x) / 32 * kTogether; token < end; token += kWarps * kTogether)
      select_experts<kTogether>(group, args, args.logits + u64(token) * experts, args.topk_ids + u64(token) * kTopK,
                                args.topk_weights + u64(token) * kTopK, end - token);
  }
}
