// ---- One call: its epoch, its counters, and how anyone in it waits ---------------------------------------------------
// A remote word has one writer rank and is compared by equality with {epoch, value}; nothing is reset between calls.
// Words that a peer polls are doubled by epoch parity: a peer can be one call ahead, never two, because every call
// waits for the counts of every rank.

constexpr u32 kAllChunks = 0x7fffffffu;
constexpr u32 kRowIsBack = 1, kSumIsBack = 2;  // values of a return word: the row of its route, or of all that its owner has

// 0 means never written. The turn of the counter keeps the parity alternating.
DEVICE u32 next_epoch(u32 epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }

DEVICE int source_at(const MoEArgs& args, int distance) {
  const int source = args.rank + distance;
  return source < args.world_size ? source : source - args.world_size;
}

struct Call {
  const MoEArgs& args;
  u32 epoch;    // of the heap: what remote words of this call carry
  u32 parity;   // of the epoch: which copy of the doubled words
  int tokens;   // of this rank in this call
  u32 party;    // this block (GPU) or thread (host), for the abort record
  u32 parties;  // how many call leave()
  Role role;
  u32* set;       // this call's counters and the arrays behind them
  u32* next_set;  // the ones to clear,
  u32 used;       // as far as the last call that had them may have changed them

  DEVICE Counters& counters() const { return *reinterpret_cast<Counters*>(set); }
  DEVICE u32* column_bits(u32 serial) const { return set + args.column_bits_at + u64(serial) * kColumnWords; }
  DEVICE u32* done_parts(u32 serial) const { return set + args.done_parts_at + serial; }
  DEVICE u32* routes_done(u32 place) const { return set + args.routes_done_at + place; }  // by place in the pool
  DEVICE u64 word(u32 value) const { return (u64(epoch) << 32) | value; }

  template <class T>
  DEVICE T* heap(int rank, u64 at) const { return reinterpret_cast<T*>(args.peers[rank] + at); }
  // What `source` writes in the heap of `rank`; the words are doubled by parity.
  DEVICE u64 twin(int source) const { return u64(parity) * args.world_size + source; }
  DEVICE u64* count_words(int rank, int source) const {  // [0] the source's tokens, [1] its tag, [kCounts + slot] rows
    return heap<u64>(rank, args.counts_at) + twin(source) * args.count_stride;
  }
  DEVICE u64* list_word(int rank, int source) const { return heap<u64>(rank, args.list_signals_at) + twin(source); }
  DEVICE u64* chunk_words(int rank, int source) const {
    return heap<u64>(rank, args.chunk_signals_at) + twin(source) * args.chunk_stride;
  }
  DEVICE ListEntry* list(int rank, int source) const {
    return heap<ListEntry>(rank, args.lists_at) + u64(source) * args.list_stride;
  }
  DEVICE Summand* summands(int rank, int source) const {
    return heap<Summand>(rank, args.summands_at) + u64(source) * args.list_stride;
  }
  DEVICE AbortRecord* failure(int rank, int source) const { return heap<AbortRecord>(rank, args.failures_at) + source; }
  DEVICE Sent* received_row(int rank, int source, int token) const {
    const u64 place = source < rank ? source : source - 1;  // a rank keeps no room for its own rows
    return row_at(heap<Sent>(rank, args.rows_at + place * args.source_stride), token, kSentRowBytes);
  }
  // What comes back to `rank` for a route of one of its tokens: a row and its word, written by the owner of the expert. An owner
  // that sums uses the slot of the token's first route there.
  DEVICE u64 return_index(int token, int slot) const { return u64(token) * kTopK + slot; }
  DEVICE Returned* return_row(int rank, int token, int slot) const {
    return row_at(heap<Returned>(rank, args.returns_at), return_index(token, slot), kReturnedRowBytes);
  }
  DEVICE u64* return_word(int rank, int token, int slot) const {
    return heap<u64>(rank, args.return_signals_at) + return_index(token, slot);
  }
  DEVICE Control* control() const { return heap<Control>(args.rank, 0); }
};

DEVICE Call begin_call(const MoEArgs& args, u32 party, u32 parties, Role role) {
  const u32 epoch = next_epoch(load_relaxed(&reinterpret_cast<Control*>(args.peers[args.rank])->epoch));
  const ScratchState scratch = *args.scratch_state;  // changes between calls alone
  const u32 turn = scratch.calls & 1;
  int tokens = args.tokens;
  if (args.num_tokens != nullptr) {
    const int asked = *args.num_tokens;
    tokens = asked < 0 ? 0 : asked < tokens ? asked : tokens;
  }
  return Call{args, epoch, epoch & 1, tokens, party, parties, role, args.counter_sets + turn * args.set_stride,
              args.counter_sets + (turn ^ 1) * args.set_stride, turn == 0 ? scratch.used[1] : scratch.used[0]};
}

// {entered, epoch} of the control page. Every party that begins a call adds 1 and the tag of its launch. It must find the epoch
// that its threads have read, and none but parties of its own launch before it: else another launch of this rank runs at the same
// time. Whoever finds that takes no part, so that no two launches ever use the memory of a call together.
constexpr u32 kPartyBits = 13, kTagMask = 0xffffffffu >> kPartyBits;
DEVICE u64* entered_word(const Call& call) { return reinterpret_cast<u64*>(&call.control()->epoch); }
DEVICE u64 enter_call(const Call& call) {
  return fetch_add_relaxed(entered_word(call), u64(launch_tag(call.args) << kPartyBits | 1) << 32);
}
DEVICE bool is_alone(const Call& call, u64 found) {
  const u32 before = u32(found >> 32), parties = before & ((1u << kPartyBits) - 1);
  const u32 tags = (parties * launch_tag(call.args)) & kTagMask;
  return next_epoch(u32(found)) == call.epoch && parties < call.parties && before >> kPartyBits == tags;
}

DEVICE bool aborted(const Call& call) { return load_relaxed(&call.control()->aborted) != 0 || stopped(); }

// The first waiter that gives up writes the record; everyone else of this rank sees `aborted` and leaves.
DEVICE void abort_call(const Call& call, Await what, u32 detail, u64 expected, u64 seen) {
  Control* control = call.control();
  if (exchange_relaxed(&control->claimed, 1u) != 0) return;
  AbortRecord* record = call.args.record;
  record->rank = call.args.rank;
  record->block = call.party;
  record->role = u32(call.role);
  record->what = u32(what);
  record->detail = detail;
  record->expected = expected;
  record->seen = seen;
  store_release<Scope::system>(&record->filled, 1u);
  store_release<Scope::device>(&control->aborted, 1u);
}

// A wait's clock: starts at the first poll that fails, so that a wait which succeeds at once never reads the time.
struct Deadline {
  u64 start = 0;
  u32 polls = 0;

  DEVICE bool passed(const Call& call, u32 patience = 1) {
    backoff(polls++);
    if (call.args.timeout_ns == 0 || polls % 64 != 0) return false;
    const u64 now = now_ns();
    if (start == 0) start = now;
    return now - start > u64(call.args.timeout_ns) * patience;
  }
};

// Poll `probe() -> u64` until `ready(value)`. False when the call is aborted, by this wait or by another. A probe may say in
// `detail` what is missing.
template <class Probe, class Ready>
DEVICE bool wait_until(const Call& call, Await what, const u32& detail, u64 expected, Probe probe, Ready ready) {
  const u32 patience = what == Await::task ? 2 : 1;  // who starves the queue gives up first, and names the cause
  Deadline deadline;
  while (true) {
    const u64 seen = probe();
    if (ready(seen)) return true;
    if (aborted(call)) return false;
    if (deadline.passed(call, patience)) {
      abort_call(call, what, detail, expected, seen);
      return false;
    }
  }
}

// Wait for a remote word of this call; its value in `*value`.
// Pairs with the store_release (or, for self-contained words, the plain store) of the rank that writes it.
DEVICE bool wait_word(const Call& call, Await what, u32 detail, const u64* word, u32* value = nullptr) {
  u64 seen = 0;
  const bool here = wait_until(
      call, what, detail, call.epoch, [&] { return (seen = load_acquire<Scope::system>(word)) >> 32; },
      [&](u64 epoch) { return epoch == call.epoch; });
  if (value != nullptr) *value = u32(seen);
  return here;
}
