// ---- Epilogues: two neighbours of a row, from the sums of the lane that holds both --------------------------------------
// Of the intermediate; a vanilla MLP has no gate.
DEVICE Pair intermediate_pair(const Acc* gate, const Acc* up, const Acc (&gate_bias)[2], const Acc (&up_bias)[2], Acc weight) {
  Acc value[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) value[i] = intermediate_element(gate[i], up[i], gate_bias[i], up_bias[i], weight);
  return pair_of(value[0], value[1]);
}

// Of an expert's result.
DEVICE Pair row_pair(const Acc* sum, const Acc (&bias)[2], Acc weight) {
  return pair_of(row_element(sum[0], bias[0], weight), row_element(sum[1], bias[1], weight));
}
