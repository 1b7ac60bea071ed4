// ---- Combine: expert rows back to the token's rank, then the weighted sum in route order ------------------------------
// A Vector that has not been looked into yet: four registers, where a 16-bit element would take one.
struct alignas(16) Packed {
  u32 word[4];
};
DEVICE Vector unpacked(const Packed& packed) {
  Vector vector;
  memcpy(&vector, &packed, sizeof vector);
  return vector;
}

struct Sum {
  Acc value[kVector];

  DEVICE void clear() {
    for (int i = 0; i < kVector; ++i) value[i] = Acc(0);
  }
  DEVICE void add(Acc weight, const Vector& vector) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = fma_of(weight, to_acc(vector.element[i]), value[i]);
  }
  DEVICE Vector rounded() const {
    Vector out;
    for (int i = 0; i < kVector; ++i) out.element[i] = from_acc(value[i]);
    return out;
  }
};

// Up to kTopK rows of one matrix and their weights, in route order.
struct WeightedRows {
  const Returned* matrix;
  int row[kTopK];  // -1: none
  Acc weight[kTopK];

  template <int kMost>
  DEVICE Vector sum(int column) const {
    constexpr int kBatch = kTopK < kMost ? kTopK : kMost;  // rows read before the first is added
    Sum sum;
    sum.clear();
#pragma unroll
    for (int start = 0; start < kTopK; start += kBatch) {
      Packed packed[kBatch];
#pragma unroll
      for (int j = start; j < start + kBatch && j < kTopK; ++j)
        if (row[j] >= 0) packed[j - start] = *reinterpret_cast<const Packed*>(row_at(matrix + column, row[j], kReturnedRowBytes));
#pragma unroll
      for (int j = start; j < start + kBatch && j < kTopK; ++j)
        if (row[j] >= 0) sum.add(weight[j], unpacked(packed[j - start]));
    }
    return sum.rounded();
  }
};

// Combine by rank: all of the token's rows on this rank are staged; send their sum, rounded once.
DEVICE WeightedRows staged_rows(const Call& call, int source, int token) {
  const MoEArgs& args = call.args;
  const ListEntry* const list = call.list(args.rank, source);
  WeightedRows rows;
  rows.matrix = row_at(args.staged_rows, source * args.staged_stride, kReturnedRowBytes);
#pragma unroll
  for (int j = 0; j < kTopK; ++j) rows.row[j] = call.ordinals(args.rank, source)[u64(token) * kTopK + j];
#pragma unroll
  for (int j = 0; j < kTopK; ++j) rows.weight[j] = !kWeightOnSum || rows.row[j] < 0 ? Acc(1) : Acc(list[rows.row[j]].weight);
  return rows;
}

template <class Group>
DEVICE void return_sum(Group& group, const Call& call, int source, int token, int slot) {
  const WeightedRows rows = staged_rows(call, source, token);
  const auto put = [&] {
    Returned* const out = call.return_row(source, token, slot);
#pragma unroll 1
    for (int column = group.lane * kVector; column < kHidden; column += group.size * kVector)
      send_part(reinterpret_cast<Vector*>(out + column), rows.sum<4>(column));
  };
  send_segments(group, call, put, 1, [&](int) { return call.return_word(source, token, slot); });
}

// The finisher of an M-block: publish its rows [first, last) to their sources. Pairs with wait_returns().
template <class Group>
DEVICE void return_rows(Group& group, const Call& call, const ReadyBlock& block, int first, int last) {
  const Span span(call, Work::return_rows, group.lane == 0, block.serial);
  delay(call);
  const MoEArgs& args = call.args;
  if (!args.combine_by_rank) {
    const Signals signals{call};
    each_row(group, call, block, first, last, [&](int, const Row& row) {
      signals.raise(call.return_word(row.source, row.token(), row.slot()));
    });
    return;
  }
  for (int start = first; start < last; start += group.size) {
    const int i = start + group.lane;
    Row row{};
    bool complete = false;
    if (i < last) {
      row = find_row(call, block.expert_slot, block.first_row + i);
      const int* ordinals = call.ordinals(args.rank, row.source) + u64(row.token()) * kTopK;
      u32 routes = 0;
      for (int j = 0; j < kTopK; ++j) routes += ordinals[j] >= 0;
      complete = fetch_add_acq_rel(call.routes_done(row.source, row.token()), 1u) + 1 == routes;
    }
#pragma unroll 1
    for (int lane = 0; lane < group.size; ++lane) {
      if (group.broadcast(u32(complete), lane) == 0) continue;
      return_sum(group, call, group.broadcast(row.source, lane), group.broadcast(row.token(), lane),
                 group.broadcast(row.slot(), lane));
    }
  }
}

// What comes back for a token: a row per live route, or per owner when the owners have summed.
DEVICE WeightedRows returned_rows(const Call& call, int token) {
  const MoEArgs& args = call.args;
  const bool weighted = kWeightOnSum && !args.combine_by_rank;
  WeightedRows rows;
  rows.matrix = call.return_row(args.rank, token, 0);
  u32 seen = 0;
#pragma unroll
  for (int j = 0; j < kTopK; ++j) {
    const int target = args.route_target[u64(token) * kTopK + j];
    rows.weight[j] = weighted ? Acc(args.topk_weights[u64(token) * kTopK + j]) : Acc(1);
    rows.row[j] = target < 0 ? -1 : target & 255;
    if (target < 0 || !args.combine_by_rank) continue;
    if ((seen >> rows.row[j] & 1) != 0) rows.row[j] = -1;
    else seen |= 1u << rows.row[j];
  }
  return rows;
}

// Wait until every row of the token is back, lane j for route j. False when the call is aborted.
template <class Group>
DEVICE bool wait_returns(Group& group, const Call& call, int token) {
  const Span span(call, Work::wait_returns, group.lane == 0, u32(token));
  bool here = true;
  for (int j = group.lane; here && j < kTopK; j += group.size) {
    const int target = call.args.route_target[u64(token) * kTopK + j];
    if (target >= 0)
      here = wait_word(call, Await::returns, u32(target >> 8), call.return_word(call.args.rank, token, target & 255));
  }
  return !group.any(!here);
}

// Columns [first, last) of y for a token.
template <class Group>
DEVICE void combine_columns(Group& group, const Call& call, int token, const WeightedRows& rows, int first, int last) {
  const Span span(call, Work::combine, group.lane == 0, u32(token), u32(first));
#pragma unroll 1
  for (int column = first + group.lane * kVector; column < last; column += group.size * kVector)
    *reinterpret_cast<Vector*>(row_at(call.args.y, token, kOutputRowBytes) + column) = rows.sum<8>(column);
}

// Every processor combines tokens when the task queue is exhausted; the rows it waits for are being computed. Few tokens are
// cut into pieces, so that each of `groups` has one.
template <class Group>
DEVICE void combine(Group& group, const Call& call, int groups) {
  const int widest = (kHidden + group.size * kVector - 1) / (group.size * kVector);  // pieces of one vector per lane
  const int wanted = call.tokens > 0 ? groups / call.tokens : 1;
  const int pieces = wanted < 1 ? 1 : wanted < widest ? wanted : widest;
  const int columns = (widest + pieces - 1) / pieces * group.size * kVector;
  while (true) {
    u32 piece = 0;
    if (group.lane == 0) piece = fetch_add_relaxed(&call.counters().combine_ticket, 1u);
    piece = group.broadcast(piece, 0);
    const int token = int(piece / u32(pieces)), first = int(piece % u32(pieces)) * columns;
    if (token >= call.tokens || stopped()) return;
    const WeightedRows rows = returned_rows(call, token);
    if (!wait_returns(group, call, token)) return;
    combine_columns(group, call, token, rows, first, first + columns < kHidden ? first + columns : kHidden);
  }
}
