// ---- Dispatch: each token row once to every other rank that owns one of its experts ----------------------------------
// A task is one chunk of tokens. It waits for nothing remote, so every row of every rank is on its way before anyone
// waits for rows. Local rows are gathered straight from x and take no detour.

DEVICE u64 owners_of_token(const Call& call, int token) {
  u64 owners = 0;
  for (int j = 0; j < kTopK; ++j) {
    const int owner = call.args.route_owner[u64(token) * kTopK + j];
    if (owner >= 0) owners |= u64(1) << owner;
  }
  return owners & ~(u64(1) << call.args.rank);
}

template <class Group>
DEVICE void dispatch_chunk(Group& group, const Call& call, int chunk) {
  const Span span(call, Work::dispatch, group.lane == 0, u32(chunk));
  const MoEArgs& args = call.args;
  const int first = chunk * kChunkTokens;
  const int last = first + kChunkTokens < call.tokens ? first + kChunkTokens : call.tokens;
  static_assert(kSentRowBytes == kInputRowBytes, "rows are sent as they are");
  const auto rows = [&] {
    for (int token = first; token < last; ++token) {
      for (u64 owners = owners_of_token(call, token); owners != 0; owners &= owners - 1)
        send_bytes(group, call.received_row(lowest_bit(owners), args.rank, token), row_at(args.x, token, kInputRowBytes),
                   kSentRowBytes);
    }
  };
  const auto word_at = [&](int rank) {  // pairs with the subscriber's wait for rows
    return rank == args.rank ? nullptr : call.chunk_words(rank, args.rank) + chunk;
  };
  send_segments(group, call, rows, args.world_size, word_at);
}

// The lists of all owners lie behind each other here; a task sends a window of them. Who sends the last entry of an owner's
// list signals that all of it is there.
constexpr u32 kWindow = 2 * kBlockM;

// What an owner needs to sum its rows of the token, of which `first` is the route's own place so far: all routes have one now.
DEVICE Summand summand_for(const Call& call, const ListEntry& entry, Summand summand, int owner) {
  const u32 token = entry.token_slot >> 8, slot = entry.token_slot & 255u;
  u32 before = 0, all = 0;
#pragma unroll
  for (u32 j = 0; j < kTopK; ++j) {
    const bool same = call.args.route_owner[u64(token) * kTopK + j] == owner;
    before += same && j < slot;
    all += same;
  }
  return Summand{summand.first - before, before << 8 | all};
}

template <class Group>
DEVICE void send_window(Group& group, const Call& call, u32 window) {
  const Span span(call, Work::dispatch, group.lane == 0, window, 1);
  const MoEArgs& args = call.args;
  const u32 first = window * kWindow, last = first + kWindow;
  const auto overlap = [&](int owner, u32* from) {
    const u32 begin = args.outgoing_first[owner], end = args.outgoing_first[owner + 1];
    *from = begin > first ? begin : first;
    const u32 to = end < last ? end : last;
    return *from < to ? to - *from : 0;
  };
  const auto lists = [&] {
    for (int owner = 0; owner < args.world_size && args.outgoing_first[owner] < last; ++owner) {
      u32 from = 0;
      const u32 count = overlap(owner, &from), place = from - args.outgoing_first[owner];
      if (owner == args.rank) continue;
      for (u32 i = group.lane; i < count; i += group.size) {
        const ListEntry entry = args.outgoing_list[from + i];
        send_part(call.list(owner, args.rank) + place + i, entry);
        send_part(call.summands(owner, args.rank) + place + i,
                  summand_for(call, entry, args.outgoing_summands[from + i], owner));
      }
    }
  };
  const auto word_at = [&](int owner) -> u64* {  // pairs with the subscriber's wait for lists
    if (owner == args.rank) return nullptr;
    u32 from = 0;
    const u32 count = overlap(owner, &from), all = args.outgoing_first[owner + 1] - args.outgoing_first[owner];
    const bool complete = all == 0 ? window == 0
                                   : count != 0 && fetch_add_acq_rel(&call.counters().list_sent[owner], count) + count == all;
    return complete ? call.list_word(owner, args.rank) : nullptr;
  };
  send_segments(group, call, lists, args.world_size, word_at);
}

// Every processor claims windows and chunks until none is left.
template <class Group>
DEVICE bool dispatch(Group& group, const Call& call, int planners) {
  bool listed = true;
  if (group.lane == 0) {  // every list of this rank is written: rows follow them, and their signals publish both
    const Span span(call, Work::wait_lists, true);
    listed = wait_until(
        call, Await::planners, 1, u64(planners),
        [&] { return u64(load_acquire<Scope::device>(&call.counters().planners_listed)); },
        [&](u64 seen) { return seen == u64(planners); });
  }
  if (!group.broadcast(listed, 0)) return false;
  if (call.args.world_size == 1) return true;
  const u32 entries = call.args.outgoing_first[call.args.world_size];
  const u32 windows = entries == 0 ? 1 : (entries + kWindow - 1) / kWindow;
  const u32 chunks = u32(call.tokens + kChunkTokens - 1) / kChunkTokens;
  while (true) {
    u32 ticket = 0;
    if (group.lane == 0) ticket = fetch_add_relaxed(&call.counters().dispatch_ticket, 1u);
    ticket = group.broadcast(ticket, 0);
    if (ticket >= windows + chunks || stopped()) return true;
    if (ticket < windows) send_window(group, call, ticket);
    else dispatch_chunk(group, call, int(ticket - windows));
  }
}
