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

DEVICE int source_at(const MoEArgs& args, int distance) {
  const int source = args.rank + distance;
  return source < args.world_size ? source : source - args.world_size;
}

DEVICE Segment& segment(const Call& call, int source, u32 expert_slot) {
  return call.args.segments[u64(source) * call.args.local_experts + expert_slot];
}

// Rows of an expert that follow each other in the list of one source.
struct Run {
  int source;
  u32 ordinal;  // of the first
  u32 rows;
};

// From `position` among the expert's rows to the end of its source's.
DEVICE Run find_run(const Call& call, u32 expert_slot, u32 position) {
  int distance = 0;
  while (true) {
    const int source = source_at(call.args, distance);
    const Segment theirs = segment(call, source, expert_slot);
    if (position < theirs.rows) return Run{source, theirs.first + position, theirs.rows - position};
    position -= theirs.rows;
    ++distance;
  }
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

// Where the expert's result goes: back to the source (combine by route), or staged until the owner has all of the token's.
DEVICE Returned* output_row(const Call& call, const Row& row) {
  if (call.args.combine_by_rank)
    return row_at(call.args.staged_rows, row.source * call.args.staged_stride + row.ordinal, kReturnedRowBytes);
  return call.return_row(row.source, row.token(), row.slot());
}

DEVICE Middle* intermediate_row(const Call& call, u32 serial, int row) {
  return row_at(call.args.ring, u64(serial % u32(call.args.ring_slots)) * kBlockM + row, kMiddleRowBytes);
}
