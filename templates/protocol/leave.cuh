// ---- Leave: clear the next call's counters, end this one ------------------------------------------------------------
template <class Group>
DEVICE void poison(Group& group, const Call& call, u32 part, u32 parts) {
  for (u64 i = part * group.size + group.lane; i < u64(call.tokens) * kHidden; i += u64(parts) * group.size)
    row_at(call.args.y, i / kHidden, kOutputRowBytes)[i % kHidden] = from_acc(quiet_nan());
}

// A record into another one, which nobody reads before it is filled.
DEVICE void copy_record(AbortRecord* to, const AbortRecord& record) {
  to->rank = record.rank;
  to->block = record.block;
  to->role = record.role;
  to->what = record.what;
  to->detail = record.detail;
  to->expected = record.expected;
  to->seen = record.seen;
  store_release<Scope::system>(&to->filled, 1u);
}

// After an abort, by one thread when all others of this rank have left: whoever gave up tells every peer, so that none waits for
// its own deadline; whoever was told takes over the record. A host that ends calls leaves none.
DEVICE void share_failure(const Call& call) {
  const MoEArgs& args = call.args;
  const bool mine = load_relaxed(&call.control()->claimed) != 0;
  for (int distance = 1; distance < args.world_size; ++distance) {
    const int peer = source_at(args, distance);
    if (mine) {
      copy_record(call.failure(peer, args.rank), *args.record);
      store_release<Scope::system>(&call.heap<Control>(peer, 0)->aborted, 1u);
    } else if (load_acquire<Scope::system>(&call.failure(args.rank, peer)->filled) != 0) {
      return copy_record(args.record, *call.failure(args.rank, peer));
    }
  }
}

// The last party to leave ends the call for the rank: it poisons y after an abort and advances the epoch.
// `clearer` of `clearers` groups clears its part of the next call's counters first.
template <class Group>
DEVICE void leave(Group& group, const Call& call, u32 clearer, u32 clearers) {
  const Span span(call, Work::leave, group.lane == 0);
  for (u64 i = clearer * group.size + group.lane; i < u64(call.used); i += u64(clearers) * group.size) call.next_set[i] = 0;
  group.sync();
  u32 last = 0;
  delay(call);
  if (group.lane == 0) last = fetch_add_acq_rel(&call.counters().left, 1u) + 1 == call.parties;
  if (!group.any(last != 0)) return;
  ScratchState* const scratch = call.args.scratch_state;
  const u32 calls = scratch->calls, finished = call.args.state->calls;
  const bool failed = aborted(call);
  if (failed) poison(group, call, 0, 1);
  if (group.lane == 0) {
    if (failed) share_failure(call);
    scratch->used[calls & 1] = u32(call.args.set_words);
    scratch->calls = calls + 1;
    call.args.state->calls = finished + 1;
    store_release<Scope::system>(entered_word(call), u64(call.epoch));
  }
}
