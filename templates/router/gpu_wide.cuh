// ---- Wide tiles: through shared memory, for many tokens --------------------------------------------------------------
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
      cp_async_wait_group<kStages - 2>();  // my share of this step is here
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

  // The second chunks of a warp's quarter meet the first ones.
  using Partials = Sums[kSide][2 * kSide][128];
  static_assert(sizeof(Partials) <= kSharedBytes);
  Partials& partials = *reinterpret_cast<Partials*>(shared);
  const int partner = thread % 128;
  if (half == 1) {
#pragma unroll
    for (int m = 0; m < kSide; ++m)
#pragma unroll
      for (int n = 0; n < 2 * kSide; ++n) partials[m][n][partner] = total[m][n];
  }
  __syncthreads();
  if (half == 1) return;
  const int token = first_token + warp_token + row;
#pragma unroll
  for (int n = 0; n < 2 * kSide; ++n) {
#pragma unroll
    for (int m = 0; m < kSide; ++m) total[m][n].add(partials[m][n][partner]);
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
