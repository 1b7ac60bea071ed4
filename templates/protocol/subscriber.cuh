// ---- Subscriber: watches the signals of every other rank and tells the scheduler how far its rows have arrived ---------
// The leading chunks of a source that are here by now, given those that were; kAllChunks when it sends no more.
template <class Group>
DEVICE u32 leading_chunks(Group& group, const Call& call, int source, u32 before) {
  const u64 count = load_acquire<Scope::system>(call.count_words(call.args.rank, source));
  const bool known = group.broadcast(u32(count >> 32 == call.epoch), 0) != 0;
  if (!known) return before;
  const u32 tokens = group.broadcast(u32(count), 0);
  const u32 chunks = (tokens + kChunkTokens - 1) / kChunkTokens;
  const u32 next = before + group.lane;
  const u64* words = call.chunk_words(call.args.rank, source);
  const bool here = next < chunks && load_acquire<Scope::system>(words + next) >> 32 == call.epoch;
  const u32 now = before + group.leading(here);
  return now == chunks ? kAllChunks : now;
}

// `arrived` is scratch of kMaxWorldSize words that the whole group sees.
template <class Group>
DEVICE void subscribe(Group& group, const Call& call, u32* arrived) {
  const MoEArgs& args = call.args;
  for (int source = group.lane; source < kMaxWorldSize; source += group.size)
    arrived[source] = source == args.rank ? kAllChunks : 0;  // the last planner tells of local rows
  group.sync();
  Deadline deadline;
  while (true) {
    u32 missing = 0;
    bool progress = false;
    for (int source = 0; source < args.world_size; ++source) {
      const u32 before = arrived[source];
      if (before == kAllChunks) continue;
      const u32 now = leading_chunks(group, call, source, before);
      group.sync();  // every lane has read `before`, and what the lanes acquired is the group's
      if (now != before && group.lane == 0) {
        delay(call);
        arrived[source] = now;
        store_release<Scope::device>(&call.counters().arrived[source], now);  // pairs with rows_arrived() of the scheduler
      }
      group.sync();
      progress = progress || now != before;
      if (now != kAllChunks) missing |= 1u << source;
    }
    // Signals nobody needs any more may still come: they carry this epoch in this parity, so they disturb no later call.
    const bool done = missing == 0 || aborted(call) || (load_relaxed(&call.counters().queue) & kClosed) != 0;
    if (group.any(done)) return;
    if (progress) deadline = Deadline{};
    bool late = false;
    if (group.lane == 0 && deadline.passed(call)) {
      const int source = lowest_bit(missing);
      abort_call(call, Await::rows, u32(source), call.epoch, arrived[source]);
      late = true;
    }
    if (group.any(late)) return;
  }
}
