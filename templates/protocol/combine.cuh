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

  // Routes whose row is a sum with all weights in it, and routes that are in the sum of another: a bit each.
  DEVICE void take_sums(u32 sums, u32 gone) {
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      if ((sums >> j & 1) != 0) weight[j] = Acc(1);
      if ((gone >> j & 1) != 0) row[j] = -1;
    }
  }
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

// All of a token's rows on this rank are in the pool from `first` on, in route order.
DEVICE WeightedRows staged_rows(const Call& call, u32 first, u32 count) {
  const MoEArgs& args = call.args;
  WeightedRows rows;
  rows.matrix = row_at(args.staged_rows, first, kReturnedRowBytes);
#pragma unroll
  for (int j = 0; j < kTopK; ++j) {
    rows.row[j] = u32(j) < count ? j : -1;
    rows.weight[j] = kWeightOnSum && u32(j) < count ? Acc(args.staged_entries[first + j].weight) : Acc(1);
  }
  return rows;
}

// Send their sum, rounded once, into the slot of the first of its routes here.
template <class Group>
DEVICE void return_sum(Group& group, const Call& call, int source, u32 first, u32 count) {
  const WeightedRows rows = staged_rows(call, first, count);
  const u32 token_slot = call.args.staged_entries[first].token_slot;
  const int token = int(token_slot >> 8), slot = int(token_slot & 255u);
  const auto put = [&] {
    Returned* const out = call.return_row(source, token, slot);
#pragma unroll 1
    for (int column = group.lane * kVector; column < kHidden; column += group.size * kVector)
      send_part(reinterpret_cast<Vector*>(out + column), rows.sum<4>(column));
  };
  send_segments(group, call, put, 1, [&](int) { return call.return_word(source, token, slot); }, kSumIsBack);
}

// The finisher of an M-block: publish its rows [first, last) to their sources. Pairs with wait_returns().
template <class Group>
DEVICE void return_rows(Group& group, const Call& call, const ReadyBlock& block, int first, int last) {
  const Span span(call, Work::return_rows, group.lane == 0, block.serial);
  delay(call);
  const Signals signals{call};
  if (call.args.pool_rows == 0) {
    each_row(group, call, block, first, last, [&](int, const Row& row) {
      signals.raise(call.return_word(row.source, row.token(), row.slot()), kRowIsBack);
    });
    return;
  }
  for (int start = first; start < last; start += group.size) {
    const int i = start + group.lane;
    Row row{};
    Pooled in_pool{};
    bool complete = false;
    if (i < last) {
      row = find_row(call, block.expert_slot, block.first_row + i);
      in_pool = pooled(call, row);
      if (in_pool.waits()) {
        call.args.staged_entries[in_pool.place()] = row.entry;
        complete = fetch_add_acq_rel(call.routes_done(in_pool.first), 1u) + 1 == in_pool.count;
      } else {
        signals.raise(call.return_word(row.source, row.token(), row.slot()), kRowIsBack);
      }
    }
#pragma unroll 1
    for (int lane = 0; lane < group.size; ++lane) {
      if (group.broadcast(u32(complete), lane) == 0) continue;
      return_sum(group, call, group.broadcast(row.source, lane), group.broadcast(in_pool.first, lane),
                 group.broadcast(in_pool.count, lane));
    }
  }
}

// What comes back for a token, as far as it is known in advance: a row per live route.
DEVICE WeightedRows returned_rows(const Call& call, int token) {
  const MoEArgs& args = call.args;
  WeightedRows rows;
  rows.matrix = call.return_row(args.rank, token, 0);
#pragma unroll
  for (int j = 0; j < kTopK; ++j) {
    rows.weight[j] = kWeightOnSum ? Acc(args.topk_weights[u64(token) * kTopK + j]) : Acc(1);
    rows.row[j] = args.route_owner[u64(token) * kTopK + j] < 0 ? -1 : j;
  }
  return rows;
}

// The first route of the token that has the owner of route j.
DEVICE int first_route(const int* owners, int j) {
  int first = j;
  for (int i = j - 1; i >= 0; --i)
    if (owners[i] == owners[j]) first = i;
  return first;
}

// Wait until every row of the token is back, lane j for route j; owners say whether they have summed. False when the call is
// aborted.
template <class Group>
DEVICE bool wait_returns(Group& group, const Call& call, int token, WeightedRows& rows) {
  const Span span(call, Work::wait_returns, group.lane == 0, u32(token));
  const int rank = call.args.rank;
  const int* const owners = call.args.route_owner + u64(token) * kTopK;
  bool here = true;
  u32 sums = 0, gone = 0;  // routes whose slot holds a sum, and the others that are in one
  for (int j = group.lane; here && j < kTopK; j += group.size) {
    if (owners[j] < 0) continue;
    const int first = owners[j] == rank ? j : first_route(owners, j);
    u32 what = 0;
    here = wait_word(call, Await::returns, u32(owners[j]), call.return_word(rank, token, first), &what);
    if (what == kSumIsBack) (first == j ? sums : gone) |= 1u << j;
    else if (first != j) here = here && wait_word(call, Await::returns, u32(owners[j]), call.return_word(rank, token, j));
  }
  if (group.any(!here)) return false;
  if (call.args.world_size > 1) rows.take_sums(group.either(sums), group.either(gone));
  return true;
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
    WeightedRows rows = returned_rows(call, token);
    if (!wait_returns(group, call, token, rows)) return;
    combine_columns(group, call, token, rows, first, first + columns < kHidden ? first + columns : kHidden);
  }
}
