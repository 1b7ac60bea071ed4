// ---- Scheduler: appends work to the task queue as soon as nothing remote is missing for it -----------------------------
// The queue is a list of entries {GEMM2 M-block, GEMM1 M-block}; each entry stands for kGemm2Tiles + kGemm1Tiles tasks, and a
// ticket names one of them. An M-block is appended when all its rows are here and it holds a slot of the intermediate
// ring; its GEMM2 follows `lag` M-blocks later, or at once when processors wait for work. So a claimed task waits only for
// tasks with lower tickets, which run: no cycle. [claimed in ticket order; dispatch waits for nothing]

struct SchedulerScratch {  // local_experts words each
  u32* rows;         // per local expert, over all sources
  u32* first_block;  // M-blocks of the experts before
  u32* spare;
};

// Wait for the counts of EVERY rank, also when there is nothing to do: it bounds how far a peer can run ahead.
template <class Group>
DEVICE bool gather_counts(Group& group, const Call& call, const SchedulerScratch& scratch) {
  const MoEArgs& args = call.args;
  const int experts = args.local_experts;
  for (int slot = group.lane; slot < experts; slot += group.size) scratch.rows[slot] = 0;
  for (int source = 0; source < args.world_size; ++source) {
    const u64* words = call.count_words(args.rank, source);
    bool here = true;
    if (group.lane == 0) here = wait_word(call, Await::counts, u32(source), words);
    for (int slot = group.lane; here && slot < experts; slot += group.size) {
      here = wait_word(call, Await::counts, u32(source), words + 1 + slot, &scratch.first_block[slot]);
      segment(call, source, u32(slot)).rows = scratch.first_block[slot];
      scratch.rows[slot] += scratch.first_block[slot];
    }
    if (group.any(!here)) return false;
    exclusive_scan(group, scratch.first_block, scratch.spare, experts);
    for (int slot = group.lane; slot < experts; slot += group.size)
      segment(call, source, u32(slot)).first = scratch.first_block[slot];
    group.sync();
  }
  return true;
}

// M-block `m` in expert order.
DEVICE ReadyBlock block_at(const SchedulerScratch& scratch, int experts, u32 m) {
  int low = 0, high = experts - 1;  // the last expert whose first block is <= m (experts without rows share it with the next)
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (scratch.first_block[middle] <= m) low = middle;
    else high = middle - 1;
  }
  const u32 first_row = (m - scratch.first_block[low]) * kBlockM;
  const u32 rest = scratch.rows[low] - first_row;
  return ReadyBlock{u32(low), first_row, rest < u32(kBlockM) ? rest : u32(kBlockM), 0};
}

// Rows of a source arrive in token order, so its last row of the block decides.
DEVICE bool rows_arrived(const Call& call, const ReadyBlock& block) {
  const MoEArgs& args = call.args;
  u32 start = 0;
  for (int distance = 0; distance < args.world_size; ++distance) {
    const int source = source_at(args, distance);
    const Segment part = segment(call, source, block.expert_slot);
    const u32 low = block.first_row > start ? block.first_row : start;
    const u32 end = block.first_row + block.rows < start + part.rows ? block.first_row + block.rows : start + part.rows;
    if (low < end) {
      const u32 arrived = load_acquire<Scope::device>(&call.counters().arrived[source]);
      if (arrived == 0) return false;  // a source's first chunk also brings its lists: not to be read before
      const ListEntry last = call.list(args.rank, source)[part.first + (end - 1 - start)];
      if ((last.token_slot >> 8) / kChunkTokens >= arrived) return false;
    }
    start += part.rows;
  }
  return true;
}

struct Queue {
  u32 entries = 0;  // written
  u32 issued = 0;   // M-blocks whose GEMM1 is in the queue
  u32 second = 0;   // M-blocks whose GEMM2 is in the queue
  u32 retired = 0;  // leading M-blocks whose GEMM2 is finished: their ring slots are free
};

// Append the ready ones of M-blocks [base, base + group.size).
template <class Group>
DEVICE void append_ready(Group& group, const Call& call, const SchedulerScratch& scratch, Queue& queue, u32 base, u32 blocks) {
  const MoEArgs& args = call.args;
  const u32 m = base + group.lane;
  const bool candidate = m < blocks && args.appended[m] != call.epoch;
  ReadyBlock block{};
  if (candidate) block = block_at(scratch, args.local_experts, m);
  const bool ready = candidate && rows_arrived(call, block);
  u32 total = 0;
  const u32 rank = group.exclusive_count(ready, &total);
  const u32 room = u32(args.ring_slots) - (queue.issued - queue.retired);
  const u32 taken = total < room ? total : room;
  if (ready && rank < taken) {
    const u32 issue = queue.issued + rank;
    const int second = int(issue) - args.lag;
    args.appended[m] = call.epoch;
    args.ready[issue] = block;
    args.entries[queue.entries + rank] = QueueEntry{second >= int(queue.second) ? second : -1, int(issue)};
  }
  queue.entries += taken;
  queue.issued += taken;
  const int second = int(queue.issued) - args.lag;
  if (second > int(queue.second)) queue.second = u32(second);
}

template <class Group>
DEVICE void publish_entries(Group& group, const Call& call, const Queue& queue, bool closed) {
  group.sync();
  if (group.lane == 0)  // pairs with wait_ready() of the processors
    store_release<Scope::device>(&call.counters().entries, queue.entries | (closed ? kClosed : 0));
}

template <class Group>
DEVICE void schedule(Group& group, const Call& call, const SchedulerScratch& scratch) {
  const MoEArgs& args = call.args;
  if (!gather_counts(group, call, scratch)) return;
  for (int slot = group.lane; slot < args.local_experts; slot += group.size)
    scratch.first_block[slot] = (scratch.rows[slot] + kBlockM - 1) / kBlockM;
  const u32 blocks = exclusive_scan(group, scratch.first_block, scratch.spare, args.local_experts);

  Queue queue;
  u32 first = 0;  // every M-block before it is appended
  while (queue.second < blocks) {
    const u32 next = queue.retired + group.lane;
    const bool done = next < queue.second && load_acquire<Scope::device>(call.gemm2_done(next)) == u32(kGemm2Tiles);
    queue.retired += group.leading(done);
    const u32 before = queue.entries;
    const u32 room = u32(args.ring_slots) - (queue.issued - queue.retired);
    for (u32 base = first; base < blocks && queue.issued < blocks && room > 0; base += group.size) {
      append_ready(group, call, scratch, queue, base, blocks);
      if (queue.issued - queue.retired == u32(args.ring_slots)) break;
    }
    group.sync();
    while (first < blocks && args.appended[first] == call.epoch) ++first;
    // Nothing new: hand out a held-back GEMM2 if all GEMM1 are out, or if a processor waits.
    const u32 asked = load_relaxed(&call.counters().task_ticket);
    const u32 offered = queue.entries * u32(kGemm1Tiles + kGemm2Tiles);
    const bool idle = group.broadcast(asked, 0) >= offered;
    if (queue.second < queue.issued && (queue.issued == blocks || (queue.entries == before && idle))) {
      if (group.lane == 0) args.entries[queue.entries] = QueueEntry{int(queue.second), -1};
      ++queue.entries;
      ++queue.second;
    }
    if (queue.entries != before) publish_entries(group, call, queue, false);
    else backoff(0);
    if (group.any(aborted(call))) return;  // whoever waits for remote events (the subscriber) or for tasks has the deadline
  }
  publish_entries(group, call, queue, true);
  if (group.lane == 0) {
    u32 rows = 0;
    for (int slot = 0; slot < args.local_experts; ++slot) rows += scratch.rows[slot];
    fetch_add_relaxed(&args.state->rows, u64(rows));
    fetch_add_relaxed(&args.state->blocks, u64(blocks));
  }
}
