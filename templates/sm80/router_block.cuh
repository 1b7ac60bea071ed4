// ---- Block program of the router --------------------------------------------------------------------------------------
// The operands of the matrix units come straight from global memory: lane l loads 16 bytes of row l / 4 of the tokens and
// of row l / 4 of the weights, at the same k, and both are cut in the same way. The "k" of an operand is then a permutation of
// the real one, the same on both sides, and a load needs neither shared memory nor ldmatrix.
//
// One order of sums for every call: chunk c (64 bytes) of a row belongs to warp c % kWarps; a warp adds its chunks in
// ascending order, and the sums of the warps are added in the order of the warps. Narrow and wide tiles, which suit few and
// many tokens, differ only in how many fragments a warp holds and how far ahead it loads. So a token's bits depend
// neither on the number of tokens nor on its place among them.
constexpr int kThreads = ${plan.threads};
constexpr int kWarps = kThreads / 32;
constexpr int kFragmentTokens = kBlockTokens;
constexpr int kFragmentExperts = ${plan.block_experts};
constexpr int kWideRows = sizeof(Element) == 2 ? 4 : 2;      // fragments of a wide tile: what 255 registers hold
constexpr int kWideColumns = 4;
constexpr int kChunk = 64 / int(sizeof(Element));            // elements of a row that one load of a warp takes
constexpr int kChunks = (kHidden + kChunk - 1) / kChunk;
constexpr int kRound = 32 / int(sizeof(Acc));                // fragments in shared memory at a time: 32 KiB

// One fragment of sums: a lane has tokens g = lane / 4 and g + 8 at experts 2 (lane % 4) and the next.
struct alignas(16) Sums {
  Acc value[4];
};
struct Operand {  // 16 bytes of a row
  u32 word[4];
};

//% if spec.dtype == "float64"
DEVICE double double_of(const Operand& a, int i) { return __hiloint2double(int(a.word[2 * i + 1]), int(a.word[2 * i])); }
DEVICE void multiply(Sums& c, const Operand& low, const Operand& high, const Operand& b) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mma_m8n8k4_f64(c.value[0], c.value[1], double_of(low, i), double_of(b, i));
    mma_m8n8k4_f64(c.value[2], c.value[3], double_of(high, i), double_of(b, i));
  }
}
//% elif spec.dtype == "float32"
// An fp32 operand is the sum of two tf32 numbers up to 2^-22 of it: three products make an fp32 router of the tf32 unit,
// whose own rounding of the operands would swap experts. The unit truncates its sums: keep them short, and add them here.
struct Split {
  u32 big[4], small[4];

  DEVICE explicit Split(const Operand& a) {
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
DEVICE void multiply(Sums& c, const Operand& low, const Operand& high, const Operand& b) {
  const Split split_low(low), split_high(high), split_b(b);
  float part[4] = {};
  multiply_step(part, split_low.small, split_high.small, split_b.big);
  multiply_step(part, split_low.big, split_high.big, split_b.small);
  multiply_step(part, split_low.big, split_high.big, split_b.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) c.value[i] += part[i];
}
//% else
DEVICE void multiply_step(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  ${"mma_m16n8k16_bf16" if spec.dtype == "bfloat16" else "mma_m16n8k16_f16"}(c, a, b0, b1);
}
DEVICE void multiply(Sums& c, const Operand& low, const Operand& high, const Operand& b) {
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

// The sums of all warps for up to kRound fragments; then warp f adds up fragment f.
static_assert(kRound <= kWarps);
using Parts = Sums[kRound][kWarps][32];

DEVICE int tiles_of(int count, int tile) { return (count + tile - 1) / tile; }

// One chunk of the rows of a tile, in the registers of a warp.
template <int kRows, int kColumns>
struct Chunk {
  Operand tokens[2 * kRows];  // 8 rows each
  Operand experts[kColumns];
};

// Where a lane reads. Rows and elements beyond the end read as zero.
template <int kRows, int kColumns>
struct Reader {
  const Element* token_row;
  const Element* expert_row;
  int tokens_left;  // from this lane's first row on
  int experts_left;
  int k;  // of this lane in chunk 0

  DEVICE static Operand load(const Element* from, bool there) {
    const uint4 bits = there ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    return Operand{{bits.x, bits.y, bits.z, bits.w}};
  }
  DEVICE void load(Chunk<kRows, kColumns>& chunk, int index) const {
    const int offset = index * kChunk;
    const bool inside = offset + k < kHidden;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i)
      chunk.tokens[i] = load(token_row + i * 8 * kHidden + offset, inside && i * 8 < tokens_left);
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      chunk.experts[i] = load(expert_row + i * 8 * kHidden + offset, inside && i * 8 < experts_left);
  }
};

// Logits of kRows * 16 tokens and kColumns * 8 experts, by the whole block.
template <int kRows, int kColumns>
DEVICE void make_logits(const RouterArgs& args, Parts& parts, int tokens, int first_token, int first_expert) {
  constexpr int kFragments = kRows * kColumns;
  constexpr int kAhead = kFragments == 1 ? 8 : 1;  // chunks in flight per warp; a wide tile is bound by L2, not by latency
  constexpr int kHeld = kFragments < kRound ? kFragments : kRound;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row = lane / 4, k = lane % 4 * kVector;
  const Reader<kRows, kColumns> reader{args.x + u64(first_token + row) * kHidden + k,
                                       args.router_weight + u64(first_expert + row) * kHidden + k,
                                       tokens - first_token - row, args.num_experts - first_expert - row, k};
  Sums sums[kFragments] = {};
  Chunk<kRows, kColumns> ring[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) reader.load(ring[i], warp + i * kWarps);
#pragma unroll 1
  for (int start = warp; start < kChunks; start += kAhead * kWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i * kWarps >= kChunks) break;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const Operand* const rows = &ring[i].tokens[f / kColumns * 2];
        multiply(sums[f], rows[0], rows[1], ring[i].experts[f % kColumns]);
      }
      reader.load(ring[i], start + (i + kAhead) * kWarps);
    }
  }

#pragma unroll
  for (int first = 0; first < kFragments; first += kHeld) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) parts[i][warp][lane] = sums[first + i];
    __syncthreads();
    if (warp < kHeld) {
      Sums total = parts[warp][0][lane];
#pragma unroll
      for (int w = 1; w < kWarps; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i) total.value[i] += parts[warp][w][lane].value[i];
      const int f = first + warp;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first_token + f / kColumns * kFragmentTokens + row + i / 2 * 8;
        const int expert = first_expert + f % kColumns * kFragmentExperts + lane % 4 * 2 + i % 2;
        if (token >= tokens || expert >= args.num_experts) continue;
        const Acc bias = args.logit_bias != nullptr ? Acc(args.logit_bias[expert]) : Acc(0);
        args.logits[u64(token) * args.num_experts + expert] = total.value[i] + bias;
      }
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
${name}(const __grid_constant__ RouterArgs args) {
  __shared__ Parts parts;
  __shared__ u64 word;
  BlockGroup block{&word};
  SelectGroup group;
  const int tokens = token_count(args), experts = args.num_experts;
  // Wide tiles read less from L2, but leave multiprocessors idle until there are enough of them.
  const int wide_tiles = tiles_of(tokens, kWideRows * kFragmentTokens) * tiles_of(experts, kWideColumns * kFragmentExperts);
  const bool wide = tokens > kFragmentTokens && wide_tiles >= int(gridDim.x) / 4;
  const int tile_tokens = wide ? kWideRows * kFragmentTokens : kFragmentTokens;
  const int tile_experts = wide ? kWideColumns * kFragmentExperts : kFragmentExperts;
  const int columns = tiles_of(experts, tile_experts);
  const int tiles = tiles_of(tokens, tile_tokens) * columns;
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    const int band = tile / columns;  // the tokens of one row of tiles
    const int first = band * tile_tokens;
    if (wide) make_logits<kWideRows, kWideColumns>(args, parts, tokens, first, tile % columns * tile_experts);
    else make_logits<1, 1>(args, parts, tokens, first, tile % columns * tile_experts);
    // The block that finishes the last tile of a band selects for its tokens. make_logits ends with a barrier, so one
    // addition releases the logits of this block and acquires those of the others.
    bool last = false;
    if (block.lane == 0) {
      last = fetch_add_acq_rel(args.counters + band, 1u) + 1 == u32(columns);
      if (last) store_relaxed(args.counters + band, 0u);  // as the next call wants it
    }
    if (!block.broadcast(last, 0)) continue;
    const int end = first + tile_tokens < tokens ? first + tile_tokens : tokens;
    for (int token = first + block.lane / 32; token < end; token += kWarps)
      select_experts(group, args, args.logits + u64(token) * experts, args.topk_ids + u64(token) * kTopK,
                     args.topk_weights + u64(token) * kTopK);
  }
}
