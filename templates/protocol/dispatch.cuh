// ---- Dispatch: each token row once to every other rank that owns one of its experts ----------------------------------
// A task is one chunk of tokens. It waits for nothing remote, so every row of every rank is on its way before anyone
// waits for rows. Local rows are gathered straight from x and take no detour.

DEVICE u32 owners_of_token(const Call& call, int token) {
  u32 owners = 0;
  for (int j = 0; j < kTopK; ++j) {
    const int target = call.args.route_target[u64(token) * kTopK + j];
    if (target >= 0) owners |= 1u << (target >> 8);
  }
  return owners & ~(1u << call.args.rank);
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
      const u32 owners = owners_of_token(call, token);
      for (int rank = 0; rank < args.world_size; ++rank) {
        if (owners >> rank & 1)
          send_bytes(group, call.received_row(rank, args.rank, token), row_at(args.x, token, kInputRowBytes), kSentRowBytes);
      }
    }
  };
  const auto word_at = [&](int rank) {  // pairs with the subscriber's wait for rows
    return rank == args.rank ? nullptr : call.chunk_words(rank, args.rank) + chunk;
  };
  send_segments(group, call, rows, args.world_size, word_at);
}

// Every processor claims chunks until none is left.
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
  const int chunks = (call.tokens + kChunkTokens - 1) / kChunkTokens;
  while (true) {
    u32 chunk = 0;
    if (group.lane == 0) chunk = fetch_add_relaxed(&call.counters().dispatch_ticket, 1u);
    chunk = group.broadcast(chunk, 0);
    if (chunk >= u32(chunks) || stopped()) return true;
    dispatch_chunk(group, call, int(chunk));
  }
}
