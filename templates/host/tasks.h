// ---- The two GEMM tasks on the host ---------------------------------------------------------------------------------
struct TileScratch {  // of one processor; the padding of every row stays zero
  std::vector<Acc> rows = std::vector<Acc>(std::size_t(kBlockM) * padded(kHidden > kIntermediate ? kHidden : kIntermediate));
  std::vector<Acc> columns = std::vector<Acc>(2 * std::size_t(padded(kHidden > kIntermediate ? kHidden : kIntermediate)));
  std::vector<Acc> sums = std::vector<Acc>(std::size_t(kBlockM) * 2);
  std::vector<Row> refs = std::vector<Row>(kBlockM);
};

DEVICE void zero_padding(Acc* row, int k) {
  for (int i = k; i < padded(k); ++i) row[i] = Acc(0);
}

// A tile of the intermediate: gate and up of one column are one pair.
DEVICE void gemm1_tile(const Call& call, const Task& task, TileScratch& scratch) {
  const Span span(call, Work::gemm1, true, task.serial, task.column);
  const MoEArgs& args = call.args;
  const int rows = int(task.block.rows);
  constexpr int kPadded = padded(kHidden);
  for (int r = 0; r < rows; ++r) {
    scratch.refs[r] = find_row(call, task.block.expert_slot, task.block.first_row + r);
    convert_row(&scratch.rows[r * kPadded], input_row(call, scratch.refs[r]), 0, kHidden);
    zero_padding(&scratch.rows[r * kPadded], kHidden);
  }
  const u32 expert = task.block.expert_slot;
  const int first = first_column(task, kIntermediateColumns), columns_end = first + columns_of(task, kIntermediateColumns);
  const int last = columns_end < kIntermediate ? columns_end : kIntermediate;
  Acc* const columns = scratch.columns.data();
  zero_padding(columns, kHidden);
  zero_padding(columns + kPadded, kHidden);
  for (int n = first; n < last; ++n) {
    const Weight* const up = row_at(row_at(args.up, expert, args.up_expert_stride), n, args.up_row_stride);
    const Weight* const gate = kGated ? row_at(row_at(args.gate, expert, args.gate_expert_stride), n, args.gate_row_stride) : up;
    convert_row(columns, gate, 0, kHidden);
    convert_row(columns + kPadded, up, 0, kHidden);
    pair_products(scratch.rows.data(), rows, columns, kPadded, scratch.sums.data());
    Acc gate_bias = 0;
    if constexpr (kGated)
      gate_bias = bias_at(args.gate_bias, args.gate_bias_expert_stride, args.gate_bias_stride, expert, n, kIntermediate);
    const Acc up_bias = bias_at(args.up_bias, args.up_bias_expert_stride, args.up_bias_stride, expert, n, kIntermediate);
    for (int r = 0; r < rows; ++r) {
      const Acc weight = Acc(scratch.refs[r].entry.weight);
      intermediate_row(call, task.serial, r)[n] =
          from_acc(intermediate_element(scratch.sums[r * 2], scratch.sums[r * 2 + 1], gate_bias, up_bias, weight));
    }
  }
  publish_tile(call, task);
}

// A tile of the expert's result, two columns at a time. False when the call is aborted.
DEVICE bool gemm2_tile(const Call& call, const Task& task, TileScratch& scratch) {
  const Span span(call, Work::gemm2, true, task.serial, task.column);
  const MoEArgs& args = call.args;
  const int rows = int(task.block.rows);
  constexpr int kPadded = padded(kIntermediate);
  for (int begin = 0; begin < kIntermediate; begin += kPartColumns) {
    if (!wait_part(call, task.serial, u32(begin / kPartColumns))) return false;
    const int end = begin + kPartColumns < kIntermediate ? begin + kPartColumns : kIntermediate;
    for (int r = 0; r < rows; ++r) convert_row(&scratch.rows[r * kPadded], intermediate_row(call, task.serial, r), begin, end);
  }
  for (int r = 0; r < rows; ++r) {
    zero_padding(&scratch.rows[r * kPadded], kIntermediate);
    scratch.refs[r] = find_row(call, task.block.expert_slot, task.block.first_row + r);
  }
  const u32 expert = task.block.expert_slot;
  const int first = first_column(task, kBlockN), columns_end = first + columns_of(task, kBlockN);
  const int last = columns_end < kHidden ? columns_end : kHidden;
  Acc* const columns = scratch.columns.data();
  zero_padding(columns, kIntermediate);
  zero_padding(columns + kPadded, kIntermediate);
  for (int n = first; n < last; n += 2) {  // H is even: rows are multiples of 16 bytes
    const Weight* const down = row_at(args.down, expert, args.down_expert_stride);
    for (int c = 0; c < 2; ++c) convert_row(columns + c * kPadded, row_at(down, n + c, args.down_row_stride), 0, kIntermediate);
    pair_products(scratch.rows.data(), rows, columns, kPadded, scratch.sums.data());
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 2; ++c) {
        const Acc bias = bias_at(args.down_bias, args.down_bias_expert_stride, args.down_bias_stride, expert, n + c, kHidden);
        const Acc value = row_element(scratch.sums[r * 2 + c], bias, Acc(scratch.refs[r].entry.weight));
        send_part(output_row(call, scratch.refs[r]) + n + c, from_acc(value));
      }
    }
  }
  if (finish_tile(call, task)) {
    Group group;
    return_rows(group, call, task.block, 0, rows);
  }
  return true;
}
