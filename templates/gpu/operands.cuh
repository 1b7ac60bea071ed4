// ---- Operands of a product: by role, and where the tile of each is in a stage of shared memory ---------------------------
constexpr int kRowBytes = kBlockK * int(sizeof(Element));  // of a stage, in both operands
struct TokenOperand {  // rows of the M-block
  static constexpr bool kTokens = true;
  static constexpr int kRows = kBlockM;
  static constexpr u32 kAt = 0, kBytes = kRows * kRowBytes;
};
struct WeightOperand {  // rows of the expert's matrix: columns of the result
  static constexpr bool kTokens = false;
  static constexpr int kRows = kBlockN;
  static constexpr u32 kAt = TokenOperand::kBytes, kBytes = kRows * kRowBytes;
};
constexpr u32 kStageBytes = TokenOperand::kBytes + WeightOperand::kBytes;
static_assert(kStageBytes == ${plan.stage_bytes});
//% set operands = {"tokens": "TokenOperand", "weights": "WeightOperand"}
using OperandA = ${operands[plan.phases[0].a.matrix]};  // gives the sums their rows
using OperandB = ${operands[plan.phases[0].b.matrix]};  // and their columns
