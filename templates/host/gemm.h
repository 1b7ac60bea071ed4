// ---- Dot products of gathered rows with weight rows ------------------------------------------------------------------
// Every sum runs over kLanes partial sums in the same k order and then over a fixed tree, whatever the tile and whoever the
// neighbours are: a row's bits depend on the row and the weights alone.
constexpr int kLanes = 64 / int(sizeof(Acc));  // one cache line of sums

constexpr int padded(int k) { return (k + kLanes - 1) / kLanes * kLanes; }

DEVICE void convert_row(Acc* to, const Element* from, int begin, int end) {
  for (int k = begin; k < end; ++k) to[k] = to_acc(from[k]);
}

DEVICE Acc tree_sum(Acc* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// out[r][c] = rows[r] . columns[c] for kRows rows and two columns; all padded with zeros to a multiple of kLanes.
template <int kRows>
DEVICE void dot_products(const Acc* rows, const Acc* columns, int k_padded, Acc* out) {
  Acc sums[kRows][2][kLanes] = {};
  for (int k = 0; k < k_padded; k += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kLanes; ++i) {
        const Acc a = rows[r * k_padded + k + i];
        sums[r][0][i] += a * columns[k + i];
        sums[r][1][i] += a * columns[k_padded + k + i];
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < 2; ++c) out[r * 2 + c] = tree_sum(sums[r][c]);
}

// Sums of one pair of weight rows with all `count` rows of the tile: out[row][2].
DEVICE void pair_products(const Acc* rows, int count, const Acc* columns, int k_padded, Acc* out) {
  int r = 0;
  for (; r + 2 <= count; r += 2) dot_products<2>(rows + r * k_padded, columns, k_padded, out + r * 2);
  if (r < count) dot_products<1>(rows + r * k_padded, columns, k_padded, out + r * 2);
}
