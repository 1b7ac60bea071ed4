// ---- Subscriber: watches the signals of every other rank and tells the scheduler how far its rows have arrived ---------
// The lanes share the sources: `width` neighbouring ones look at as many chunks of one source at a time.
template <class Group>
DEVICE u32 lanes_per_source(const Group& group, int world_size) {
  u32 width = u32(group.size);
  while (width > 1 && width * u32(world_size - 1) > u32(group.size)) width /= 2;
  return width;
}

// Chunks of a source, kAllChunks when none is still to come, and whether its next one, for this lane, is here.
struct Look {
  u32 chunks;
  bool known, here;
};
DEVICE Look look_at(const Call& call, int source, u32 next) {
  const int rank = call.args.rank;
  const u64 count = load_acquire<Scope::system>(call.count_words(rank, source));
  const u64 list = load_acquire<Scope::system>(call.list_word(rank, source));
  const u32 chunks = (u32(count) + kChunkTokens - 1) / kChunkTokens;
  const bool known = count >> 32 == call.epoch && (list >> 32 == call.epoch || chunks == 0);
  const u64* const words = call.chunk_words(rank, source);
  const bool here = known && next < chunks && load_acquire<Scope::system>(words + next) >> 32 == call.epoch;
  return Look{chunks, known, here};
}

// One look at every source. `arrived` is scratch of kMaxWorldSize words that the whole group sees. Returns whether any moved on;
// `*missing` is a source that this lane still waits for, -1: none.
template <class Group>
DEVICE bool look_at_sources(Group& group, const Call& call, u32* arrived, u32 width, int* missing) {
  const MoEArgs& args = call.args;
  const u32 part = u32(group.lane) / width, lane = u32(group.lane) % width;
  bool moved = false;
  *missing = -1;
  for (int base = 0; base < args.world_size; base += int(u32(group.size) / width)) {
    const int source = base + int(part);
    const u32 before = source < args.world_size ? arrived[source] : kAllChunks;
    Look look{};
    if (before != kAllChunks) look = look_at(call, source, before + lane);
    const u32 votes = group.votes(look.here) >> (part * width);  // and what its lanes acquired is the group's
    const u32 others = ~votes & (width == 32 ? 0xffffffffu : (1u << width) - 1);
    u32 now = before;
    if (look.known) now = before + (others == 0 ? width : u32(lowest_bit(u64(others))));
    if (look.known && now == look.chunks) now = kAllChunks;
    if (lane == 0 && now != before) {
      delay(call);
      arrived[source] = now;
      store_release<Scope::device>(&call.counters().arrived[source], now);  // pairs with rows_arrived() of the scheduler
    }
    moved = moved || now != before;
    if (now != kAllChunks && *missing < 0) *missing = source;
    group.sync();
  }
  return group.any(moved);
}

template <class Group>
DEVICE void subscribe(Group& group, const Call& call, u32* arrived) {
  const MoEArgs& args = call.args;
  for (int source = group.lane; source < args.world_size; source += group.size)
    arrived[source] = source == args.rank ? kAllChunks : 0;  // the last planner tells of local rows
  group.sync();
  const u32 width = lanes_per_source(group, args.world_size);
  Deadline deadline;
  while (true) {
    int missing = -1;
    if (look_at_sources(group, call, arrived, width, &missing)) deadline = Deadline{};
    // Signals nobody needs any more may still come: they carry this epoch in this parity, so they disturb no later call.
    const bool all = !group.any(missing >= 0);
    if (all || group.any(aborted(call) || (load_relaxed(&call.counters().queue) & kClosed) != 0)) return;
    const bool late = group.any(group.lane == 0 && deadline.passed(call));
    if (late && missing >= 0) abort_call(call, Await::rows, u32(missing), call.epoch, arrived[missing]);
    if (late) return;
  }
}
