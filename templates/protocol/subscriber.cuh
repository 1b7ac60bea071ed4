// ---- Subscriber: watches the signals of every source and tells the scheduler how far its rows have arrived -------------
template <class Group>
DEVICE bool source_progressed(Group& group, const Call& call, int source, u32* arrived) {
  const MoEArgs& args = call.args;
  const int me = args.rank;
  if (*arrived == 0) {
    const u64 seen = load_acquire<Scope::system>(call.list_word(me, source));
    if (seen >> 32 != call.epoch) return false;
    *arrived = source == me ? kAllChunks : 1;  // local rows are in x since before the call
    return true;
  }
  const u32 tokens = u32(load_relaxed(call.list_word(me, source)));
  const u32 chunks = (tokens + kChunkTokens - 1) / kChunkTokens;
  const u32 next = *arrived - 1 + group.lane;
  const bool here = next < chunks && load_acquire<Scope::system>(call.chunk_words(me, source) + next) >> 32 == call.epoch;
  const u32 more = group.leading(here);
  *arrived = *arrived + more == chunks + 1 ? kAllChunks : *arrived + more;
  return more != 0 || *arrived == kAllChunks;
}

template <class Group>
DEVICE void subscribe(Group& group, const Call& call) {
  const MoEArgs& args = call.args;
  u32 arrived[kMaxWorldSize] = {};
  Deadline deadline;
  while (true) {
    bool complete = true, progress = false;
    for (int source = 0; source < args.world_size; ++source) {
      if (arrived[source] == kAllChunks) continue;
      if (source_progressed(group, call, source, &arrived[source])) {
        progress = true;
        group.sync();
        if (group.lane == 0)  // pairs with rows_arrived() of the scheduler
          store_release<Scope::device>(&call.counters().arrived[source], arrived[source]);
      }
      complete = complete && arrived[source] == kAllChunks;
    }
    // Signals nobody needs any more may still come: they carry this epoch in this parity, so they disturb no later call.
    const bool done = complete || aborted(call) || (load_relaxed(&call.counters().entries) & kClosed) != 0;
    if (group.any(done)) return;
    if (progress) deadline = Deadline{};
    bool late = false;
    if (group.lane == 0 && deadline.passed(call)) {
      int source = 0;
      while (arrived[source] == kAllChunks) ++source;
      abort_call(call, arrived[source] == 0 ? Await::lists : Await::rows, u32(source), call.epoch, arrived[source]);
      late = true;
    }
    if (group.any(late)) return;
  }
}
