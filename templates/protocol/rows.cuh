// ---- Rows of an M-block -------------------------------------------------------------------------------------------
// The rows of one local expert are the concatenation of its segments, one per source, nearest source first (local rows
// lead), token order within a source. An M-block is kBlockM consecutive rows of it.

struct Row {
  int source;
  u32 ordinal;  // among all rows this source sends to this rank
  ListEntry entry;

  DEVICE int token() const { return int(entry.token_slot >> 8); }
  DEVICE int slot() const { return int(entry.token_slot & 255u); }
};

// The segments of an expert by distance, nearest first.
DEVICE Segment* segments_of(const Call& call, u32 expert_slot) {
  return call.args.segments + u64(expert_slot) * call.args.world_size;
}

// The distance of the source that has the row at `position` of the expert: the last one that starts there or before.
DEVICE int distance_of(const Call& call, const Segment* segments, u32 position) {
  int low = 0, high = call.args.world_size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (segments[middle].start <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Rows of an expert that follow each other in the list of one source.
struct Run {
  int source;
  u32 ordinal;  // of the first
  u32 rows;
};

// From `position` among the expert's rows to the end of its source's.
DEVICE Run find_run(const Call& call, u32 expert_slot, u32 position) {
  const Segment* const segments = segments_of(call, expert_slot);
  const Segment theirs = segments[distance_of(call, segments, position)];
  const u32 inside = position - theirs.start;
  return Run{int(theirs.source), theirs.first + inside, theirs.rows - inside};
}

DEVICE Row find_row(const Call& call, u32 expert_slot, u32 position) {
  const Run run = find_run(call, expert_slot, position);
  return Row{run.source, run.ordinal, call.list(call.args.rank, run.source)[run.ordinal]};
}

// visit(r, row) for rows [first, last) of an M-block, spread over the lanes. All that its first run covers, usually the whole
// block, are looked up at once.
template <class Group, class Visit>
DEVICE void each_row(const Group& group, const Call& call, const ReadyBlock& block, int first, int last, Visit visit) {
  if (first >= last) return;
  constexpr int kRounds = (kBlockM + Group::size - 1) / Group::size;
  const Run run = find_run(call, block.expert_slot, block.first_row + first);
  const int covered = u32(last - first) < run.rows ? last : first + int(run.rows);
  const ListEntry* const list = call.list(call.args.rank, run.source) + run.ordinal;
  ListEntry entry[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int r = group.lane + i * group.size;
    if (first + r < covered) entry[i] = list[r];
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int r = group.lane + i * group.size;
    if (first + r < covered) visit(first + r, Row{run.source, run.ordinal + r, entry[i]});
  }
#pragma unroll 1
  for (int r = covered + group.lane; r < last; r += group.size) visit(r, find_row(call, block.expert_slot, block.first_row + r));
}

// Where the token's row is: in x, or in the heap where its source stored it.
DEVICE const Input* input_row(const Call& call, const Row& row) {
  if (row.source == call.args.rank) return row_at(call.args.x, row.token(), kInputRowBytes);
  return call.received_row(call.args.rank, row.source, row.token());
}

// Rows that a token of another rank has here, if it has several and the pool has room for its source's: they wait there, next to
// each other and in route order, until all are done, and go back as one.
constexpr u32 kNoRoom = 0xffffffffu;
struct Pooled {
  u32 first;  // place of the token's first row in the pool
  u32 index;  // which of them this row is
  u32 count;  // how many they are; below 2 the row goes back as it is

  DEVICE bool waits() const { return count > 1; }
  DEVICE u32 place() const { return first + index; }
};

DEVICE Pooled pooled(const Call& call, const Row& row) {
  const MoEArgs& args = call.args;
  if (args.pool_rows == 0 || row.source == args.rank || args.pool_first[row.source] == kNoRoom) return Pooled{0, 0, 1};
  const Summand summand = call.summands(args.rank, row.source)[row.ordinal];
  return Pooled{args.pool_first[row.source] + summand.first, summand.index_of >> 8, summand.index_of & 255u};
}

// Where the expert's result goes: back to the source, or into the pool.
DEVICE Returned* output_row(const Call& call, const Row& row) {
  const Pooled in_pool = pooled(call, row);
  if (in_pool.waits()) return row_at(call.args.staged_rows, in_pool.place(), kReturnedRowBytes);
  return call.return_row(row.source, row.token(), row.slot());
}

DEVICE Middle* intermediate_row(const Call& call, u32 serial, int row) {
  return row_at(call.args.ring, u64(serial % u32(call.args.ring_slots)) * kBlockM + row, kMiddleRowBytes);
}
