// ---- Counts: what every source sends here, and so where its rows of an expert are, and whether they are summed ----------------
// Wait for the tokens of EVERY rank, also when there is nothing to do: it bounds how far a peer can run ahead. And for its tag:
// ranks that make different calls must not go on.
template <class Group>
DEVICE bool wait_for_ranks(Group& group, const Call& call) {
  const MoEArgs& args = call.args;
  bool alike = true;
  for (int source = group.lane; alike && source < args.world_size; source += group.size) {
    const u64* words = call.count_words(args.rank, source);
    u64 tag = 0;
    const auto probe = [&] {  // both words on their way at a time
      tag = load_relaxed(words + 1);
      const u64 tokens = load_relaxed(words);
      return (tokens >> 32) == (tag >> 32) ? tag >> 32 : 0;
    };
    alike = wait_until(call, Await::counts, u32(source), call.epoch, probe, [&](u64 epoch) { return epoch == call.epoch; });
    if (!alike || u32(tag) == args.tag) continue;
    abort_call(call, Await::tag, u32(source), args.tag, u32(tag));
    alike = false;
  }
  return !group.any(!alike);
}

// Where each source's rows of an expert begin among those of all, nearest source first.
template <class Group>
DEVICE void order_by_distance(Group& group, const Call& call, SystemScratch& scratch) {
  const MoEArgs& args = call.args;
  const int world = args.world_size, all = args.local_experts * world;
  group.sync();  // the segments are there
  u32 before = 0;
  for (int base = 0; base < all; base += group.size) {
    const int at = base + group.lane, slot = at / world, distance = at % world;
    u32 total = 0;
    const u32 rows = at < all ? args.segments[at].rows : 0;
    const u32 first = before + group.exclusive_sum(rows, &total);
    before += total;
    if (at < all && distance == 0) scratch.first_panel[slot] = first;  // not used yet
    group.sync();
    if (at >= all) continue;
    const u32 start = first - scratch.first_panel[slot];
    args.segments[at].start = start;
    if (distance == world - 1) scratch.rows[slot] = start + rows;
  }
}

// Which sources' rows are summed here before they go back: nearest first, as long as the pool has room for all that a source
// may need. The counts alone decide, so that bits do not depend on who comes first.
template <class Group>
DEVICE void share_pool(Group& group, const Call& call, const SystemScratch& scratch, u32 all) {
  const MoEArgs& args = call.args;
  if (group.lane != 0 || args.pool_rows == 0 || args.local_experts == 0) return;
  u32 taken = 0;
  for (int distance = 1; distance < args.world_size; ++distance) {
    const int source = source_at(args, distance);
    const u32 end = source + 1 < args.world_size ? scratch.source_start[source + 1] : all;
    const u32 rows = end - scratch.source_start[source];
    const bool room = taken + rows <= u32(args.pool_rows);
    args.pool_first[source] = room ? taken : kNoRoom;
    taken += room ? rows : 0;
  }
}

template <class Group>
DEVICE bool gather_counts(Group& group, const Call& call, SystemScratch& scratch) {
  const Span span(call, Work::gather_counts, group.lane == 0);
  if (!wait_for_ranks(group, call)) return false;
  const MoEArgs& args = call.args;
  const int experts = args.local_experts, words = args.world_size * experts;  // source by source
  const auto source_of = [&](int at) { return args.world_size == 1 ? 0 : at / experts; };
  constexpr int kBatch = 4;  // words on their way to a lane at a time; each is complete in itself
  u32 before = 0;            // rows of the words before
  for (int base = group.lane; base - group.lane < words; base += kBatch * group.size) {
    u64 seen[kBatch] = {};
    u32 missing = 0;  // the source of a word that is not here
    const auto probe = [&] {
      u64 epoch = call.epoch;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = base + i * group.size, source = source_of(at);
        if (at < words) seen[i] = load_relaxed(call.count_words(args.rank, source) + kCounts + (at - source * experts));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = base + i * group.size;
        if (at >= words || seen[i] >> 32 == call.epoch) continue;
        epoch = 0;
        missing = u32(source_of(at));
      }
      return epoch;
    };
    const bool here =
        wait_until(call, Await::counts, missing, call.epoch, probe, [&](u64 epoch) { return epoch == call.epoch; });
    if (group.any(!here)) return false;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = base + i * group.size, source = source_of(at), slot = at - source * experts;
      const u32 rows = u32(seen[i]);
      u32 total = 0;
      const u32 first = before + group.exclusive_sum(rows, &total);
      before += total;
      if (args.world_size == 1) {
        if (at >= words) continue;
        args.segments[slot] = Segment{first, rows, 0, 0};
        scratch.rows[slot] = rows;
        continue;
      }
      if (at < words && slot == 0) scratch.source_start[source] = first;
      group.sync();
      if (at >= words) continue;
      const int distance = source >= args.rank ? source - args.rank : source - args.rank + args.world_size;
      segments_of(call, u32(slot))[distance] = Segment{first - scratch.source_start[source], rows, 0, u32(source)};
    }
  }
  if (args.world_size > 1) {
    order_by_distance(group, call, scratch);
    share_pool(group, call, scratch, before);
  }
  group.sync();
  return true;
}
