// ---- Leave: clear the next call's counters, end this one ------------------------------------------------------------
// The last party to leave ends the call for the rank: it poisons y after an abort and advances the epoch.
// `clearer` of `clearers` groups clears its part of the next call's counters first.
template <class Group>
DEVICE void leave(Group& group, const Call& call, u32 clearer, u32 clearers) {
  const Span span(call, Work::leave, group.lane == 0);
  for (u64 i = clearer * group.size + group.lane; i < u64(call.args.set_words); i += u64(clearers) * group.size)
    call.next_set[i] = 0;
  group.sync();
  u32 last = 0;
  delay(call);
  if (group.lane == 0) last = fetch_add_acq_rel(&call.counters().left, 1u) + 1 == call.parties;
  if (!group.any(last != 0)) return;
  if (aborted(call)) {
    for (u64 i = group.lane; i < u64(call.tokens) * kHidden; i += group.size)
      row_at(call.args.y, i / kHidden, kOutputRowBytes)[i % kHidden] = from_acc(quiet_nan());
  }
  if (group.lane == 0) {
    store_relaxed(&call.args.state->calls, load_relaxed(&call.args.state->calls) + 1);
    store_release<Scope::system>(&call.control()->epoch, call.epoch);
  }
}
