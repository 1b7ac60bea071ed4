// ---- Matrix atoms: 16 rows times 8 columns, both operands in shared memory with k contiguous ----------------------------
// Every dtype has one accumulator layout: lane l holds rows g = l / 4 and g + 8 at columns 2 (l % 4) and the next, as
// {(g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)}.
using Accumulator = Acc[4];

// A tile in shared memory is rows of kRowBytes. Its 16-byte chunks are permuted within a 128-byte line, so that eight rows
// read at one chunk (ldmatrix), and four rows read at two neighbouring chunks (fp64), touch every bank once.
template <int kRowBytes>
DEVICE constexpr u32 swizzle(u32 row) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  const u32 line = kRowBytes == 128 ? row : row / 2;
  const u32 reversed = (line & 1) << 2 | (line & 2) | (line >> 2 & 1);
  return kRowBytes == 128 ? reversed : reversed >> 1;
}

// The place of a lane's data in a tile: `byte` of the first k step of `row`. Rows further on by a multiple of 8 have the same
// swizzle. The tile starts at a multiple of kRowBytes, so a k step enters by xor; that is all there is to compute per step.
template <int kRowBytes>
struct Place {
  u32 first;

  DEVICE Place(u32 row, u32 byte) : first(row * kRowBytes + (swizzle<kRowBytes>(row) * 16 ^ byte)) {}
  DEVICE u32 at(u32 tile, int rows_on, u32 step_start) const { return ((tile + first) ^ step_start) + rows_on * kRowBytes; }
};

//% if spec.dtype == "float64"
constexpr int kStepBytes = 32;     // k4
constexpr int kUnrolledSteps = 2;  // more would take registers for operands far ahead
struct RowFragment {
  double low, high;  // rows g and g + 8, k = l % 4
};
struct ColumnFragment {
  double value[2];  // two atoms' columns
};

template <int kRowBytes>
DEVICE Place<kRowBytes> row_place(u32 lane) { return {lane / 4, lane % 4 * 8}; }
template <int kRowBytes>
DEVICE Place<kRowBytes> column_place(u32 lane) { return {lane / 4, lane % 4 * 8}; }

template <int kRowBytes>
DEVICE void load_rows(RowFragment& a, const Place<kRowBytes>& place, u32 tile, int rows_on, u32 step_start) {
  a.low = ld_shared_f64(place.at(tile, rows_on, step_start));
  a.high = ld_shared_f64(place.at(tile, rows_on + 8, step_start));
}
template <int kRowBytes>
DEVICE void load_columns(ColumnFragment& b, const Place<kRowBytes>& place, u32 tile, int columns_on, u32 step_start) {
  b.value[0] = ld_shared_f64(place.at(tile, columns_on, step_start));
  b.value[1] = ld_shared_f64(place.at(tile, columns_on + 8, step_start));
}
template <int kAtom>
DEVICE void multiply(Accumulator& c, const RowFragment& a, const ColumnFragment& b) {
  mma_m8n8k4_f64(c[0], c[1], a.low, b.value[kAtom]);
  mma_m8n8k4_f64(c[2], c[3], a.high, b.value[kAtom]);
}
//% elif spec.dtype == "float32" and tile and tile.math == "ffma"
constexpr int kStepBytes = 16;     // k4: IEEE products and sums, k ascending
constexpr int kUnrolledSteps = 1;  // ptxas would load the operands of all steps before the first product
struct RowFragment {
  float value[2][4];  // rows g and g + 8
};
struct ColumnFragment {
  float value[2][2][4];  // [atom][column of the lane]
};

// A lane's two columns are neighbours, so they need a place each.
template <int kRowBytes>
struct PairPlace {
  Place<kRowBytes> column[2];
};
template <int kRowBytes>
DEVICE Place<kRowBytes> row_place(u32 lane) { return {lane / 4, 0}; }
template <int kRowBytes>
DEVICE PairPlace<kRowBytes> column_place(u32 lane) {
  const u32 first = lane % 4 * 2;
  return {{Place<kRowBytes>(first, 0), Place<kRowBytes>(first + 1, 0)}};
}

template <int kRowBytes>
DEVICE void load_rows(RowFragment& a, const Place<kRowBytes>& place, u32 tile, int rows_on, u32 step_start) {
  ld_shared_v4(a.value[0], place.at(tile, rows_on, step_start));
  ld_shared_v4(a.value[1], place.at(tile, rows_on + 8, step_start));
}
template <int kRowBytes>
DEVICE void load_columns(ColumnFragment& b, const PairPlace<kRowBytes>& place, u32 tile, int columns_on, u32 step_start) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    ld_shared_v4(b.value[0][i], place.column[i].at(tile, columns_on, step_start));
    ld_shared_v4(b.value[1][i], place.column[i].at(tile, columns_on + 8, step_start));
  }
}
template <int kAtom>
DEVICE void multiply(Accumulator& c, const RowFragment& a, const ColumnFragment& b) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = fma_of(a.value[i / 2][k], b.value[kAtom][i % 2][k], c[i]);
}
//% else
constexpr int kStepBytes = 32;     // k16 of 16-bit elements, k8 of tf32
constexpr int kUnrolledSteps = 2;  // more would take registers for operands far ahead
struct RowFragment {
  u32 value[4];
};
struct ColumnFragment {
  u32 value[2][2];  // [atom][k half]
};

// ldmatrix hands lane l the 4 bytes l % 4 of row l / 4 of each matrix, which is the operand layout of mma: the matrices of a
// row fragment are (rows 0-7, k low), (8-15, low), (0-7, high), (8-15, high); of two column fragments (columns 0-7, low),
// (0-7, high), (8-15, low), (8-15, high).
template <int kRowBytes>
DEVICE Place<kRowBytes> row_place(u32 lane) { return {lane % 16, lane / 16 * 16}; }
template <int kRowBytes>
DEVICE Place<kRowBytes> column_place(u32 lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16}; }

constexpr bool kRoundOperands = ${(spec.dtype == "float32") | cpp};  // the matrix unit would truncate fp32 to tf32
template <int kCount>
DEVICE void round_operands(u32 (&value)[kCount]) {
  if constexpr (kRoundOperands) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = cvt_rna_tf32_f32(value[i]);
  }
}

template <int kRowBytes>
DEVICE void load_rows(RowFragment& a, const Place<kRowBytes>& place, u32 tile, int rows_on, u32 step_start) {
  ldmatrix_x4(a.value[0], a.value[1], a.value[2], a.value[3], place.at(tile, rows_on, step_start));
  round_operands(a.value);
}
template <int kRowBytes>
DEVICE void load_columns(ColumnFragment& b, const Place<kRowBytes>& place, u32 tile, int columns_on, u32 step_start) {
  ldmatrix_x4(b.value[0][0], b.value[0][1], b.value[1][0], b.value[1][1], place.at(tile, columns_on, step_start));
  round_operands(b.value[0]);
  round_operands(b.value[1]);
}
//%   if spec.dtype == "bfloat16"
DEVICE void multiply_step(Accumulator& c, const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_bf16(c, a, b[0], b[1]); }
//%   elif spec.dtype == "float16"
DEVICE void multiply_step(Accumulator& c, const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_f16(c, a, b[0], b[1]); }
//%   else
DEVICE void multiply_step(Accumulator& c, const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k8_tf32(c, a, b[0], b[1]); }
//%   endif
template <int kAtom>
DEVICE void multiply(Accumulator& c, const RowFragment& a, const ColumnFragment& b) {
  multiply_step(c, a.value, b.value[kAtom]);
}
//% endif
