// ---- The expert's activation, in the accumulator's precision --------------------------------------------------------
//% if spec.activation == "silu"
DEVICE Acc activate(Acc z) { return divide_of(z, Acc(1) + exp_of(-z)); }
//% elif spec.activation == "gelu"
DEVICE Acc activate(Acc z) { return Acc(0.5) * z * (Acc(1) + erf_of(z * Acc(0.70710678118654752440))); }
//% elif spec.activation == "gelu_tanh"
DEVICE Acc activate(Acc z) {
  const Acc inner = Acc(0.79788456080286535588) * (z + Acc(0.044715) * z * z * z);
  return Acc(0.5) * z * (Acc(1) + tanh_of(inner));
}
//% elif spec.activation == "relu"
DEVICE Acc activate(Acc z) { return z > Acc(0) || z != z ? z : Acc(0); }
//% else
DEVICE Acc activate(Acc z) { return z; }
//% endif

// swish_alpha * act(swish_beta * z); the factors vanish at compile time when they are 1.
DEVICE Acc swish(Acc z) {
  if constexpr (kSwishBeta != 1.0) z *= Acc(kSwishBeta);
  Acc h = activate(z);
  if constexpr (kSwishAlpha != 1.0) h *= Acc(kSwishAlpha);
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
