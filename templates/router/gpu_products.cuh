// ---- Products of the router on a GPU, and the order of their sums ----------------------------------------------------
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
  float sum[4] = {};
  multiply_step(sum, low.small, high.small, b.big);
  multiply_step(sum, low.big, high.big, b.small);
  multiply_step(sum, low.big, high.big, b.big);
#pragma unroll
  for (int i = 0; i < 4; ++i) c.value[i] += sum[i];
}
//% else
using Factor = Operand;
//%   if spec.dtype == "bfloat16"
DEVICE void multiply_step(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_m16n8k16_bf16(c, a, b0, b1); }
//%   else
DEVICE void multiply_step(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_m16n8k16_f16(c, a, b0, b1); }
//%   endif
DEVICE void multiply(Sums& c, const Factor& low, const Factor& high, const Factor& b) {
#pragma unroll
  for (int i = 0; i < 4; i += 2)
    multiply_step(c.value, {low.word[i], high.word[i], low.word[i + 1], high.word[i + 1]}, b.word[i], b.word[i + 1]);
}
//% endif

DEVICE Acc bias_of(const RouterArgs& args, int expert) {
  return args.logit_bias != nullptr ? Acc(args.logit_bias[expert]) : Acc(0);
}
