// ---- Narrow tiles: one fragment, for few tokens ----------------------------------------------------------------------
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
  using Partials = Acc[kWarps][2][kSums];
  static_assert(sizeof(Partials) <= kSharedBytes && kSums <= kThreads);
  Partials& partials = *reinterpret_cast<Partials*>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) reinterpret_cast<Sums*>(partials[warp][half])[lane] = sums[half];
  __syncthreads();
  const int place = int(threadIdx.x);
  if (place >= kSums) return;
  Acc total[2] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] += partials[w][half][place];
  const int token = first_token + place / 16 + place % 4 / 2 * 8;
  const int column = first_expert + place / 4 % 4 * 2 + place % 2;
  if (token < tokens && column < args.num_experts)
    args.logits[u64(token) * args.num_experts + column] = total[0] + total[1] + bias_of(args, column);
}
