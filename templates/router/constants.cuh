// ---- What this router is specialised for ------------------------------------------------------------------------------
constexpr int kHidden = ${spec.hidden_size};
constexpr int kTopK = ${spec.top_k};
constexpr bool kSoftmax = ${(spec.scoring == "softmax") | cpp};  // else sigmoid
constexpr bool kRenormalize = ${spec.renormalize | cpp};
constexpr bool kTop2Groups = ${(spec.group_score == "top2_sum") | cpp};  // else the best alone
constexpr double kRoutedScale = ${spec.routed_scale | cpp};
constexpr int kMaxExperts = ${plan.max_experts};
constexpr int kBlockTokens = ${plan.block_tokens};  // tokens whose logits are made together
using Key = ${"u64" if spec.element.accumulator == "double" else "u32"};  // as wide as Acc
