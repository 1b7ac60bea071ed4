// ---- Biases of an expert's matrix; strides are in bytes -------------------------------------------------------------------
DEVICE Acc bias_at(const Bias* bias, long long expert_stride, long long stride, u32 expert, int column, int width) {
  if constexpr (!kBias) return Acc(0);
  return column < width ? to_acc(*row_at(row_at(bias, expert, expert_stride), column, stride)) : Acc(0);
}
