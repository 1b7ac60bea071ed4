// ---- The expert's activation, in the accumulator's precision --------------------------------------------------------
//% if spec.activation == "silu"
DEVICE Acc activate(Acc z) { return divide_of(z, Acc(1) + exp_of(-z)); }
//% elif spec.activation == "gelu"
DEVICE Acc activate(Acc z) { return z * normal_cdf(z); }
//% elif spec.activation == "gelu_tanh"
// 1 + tanh(u) is 2 / (1 + exp(-2 u)), which loses no digits where it is small.
DEVICE Acc activate(Acc z) {
  return divide_of(z, Acc(1) + exp_of(-z * fma_of(z * z, Acc(0.071354816272600248776), Acc(1.5957691216057307118))));
}
//% elif spec.activation == "relu"
DEVICE Acc activate(Acc z) { return z > Acc(0) || z != z ? z : Acc(0); }
//% else
DEVICE Acc activate(Acc z) { return z; }
//% endif

// swish_alpha * act(swish_beta * z), scaled as the intermediate is; the factors vanish at compile time when they are 1.
DEVICE Acc swish(Acc z) {
  if constexpr (kSwishBeta != 1.0) z *= Acc(kSwishBeta);
  Acc h = activate(z);
  if constexpr (kSwishAlpha * kIntermediateScale != 1.0) h *= Acc(kSwishAlpha * kIntermediateScale);
  return h;
}

// One element of the intermediate from the two GEMM1 sums; `weight` scales the expert's input when kWeightOnInput
// (GEMM1 is linear, so scaling its sums needs no second copy of the row). A vanilla MLP has no gate.
DEVICE Acc intermediate_element(Acc gate, Acc up, Acc gate_bias, Acc up_bias, Acc weight) {
  if constexpr (kWeightOnInput) {
    gate *= weight;
    up *= weight;
  }
  if constexpr (kBias) {
    gate += gate_bias;
    up += up_bias;
  }
  if constexpr (!kGated) return swish(up);
  if constexpr (kGateLimit > 0.0) {
    const Acc limit = Acc(kGateLimit);
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
  }
  if constexpr (kUpOffset != 0.0) up += Acc(kUpOffset);
  return swish(gate) * up;
}

// One element of an expert's row from its GEMM2 sum.
DEVICE Acc row_element(Acc sum, Acc bias, Acc weight) {
  if constexpr (kIntermediateScale != 1.0) sum *= Acc(1.0 / kIntermediateScale);
  sum += bias;
  if constexpr (kWeightOnRow) sum *= weight;
  return sum;
}
