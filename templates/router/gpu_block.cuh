// ---- Block program of the router on a GPU ----------------------------------------------------------------------------
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
