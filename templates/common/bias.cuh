// ---- Biases ---------------------------------------------------------------------------------------------------------
// Of one column of an expert's matrix of `width` columns; past them, and without biases, zero.
DEVICE Acc bias_at(const Element* bias, long long expert_stride, long long stride, u32 expert, int column, int width) {
  if constexpr (!kBias) return Acc(0);
  return column < width ? to_acc(bias[expert * expert_stride + column * stride]) : Acc(0);
}
