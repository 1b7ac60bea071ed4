// ---- Scheduler: appends work to the task queue as soon as nothing remote is missing for it -----------------------------
// A group is up to `group` consecutive M-blocks of one expert; their tasks are ordered column by column, so that a weight
// tile is read from memory once. The queue is a list of entries {GEMM2 group, GEMM1 group}; each stands for
// group * (kGemm2Tiles + kGemm1Tiles) tasks, and a ticket names one of them. A group is appended when all its rows are here
// and its M-blocks hold slots of the intermediate ring; its GEMM2 follows `lag` M-blocks later, or at once when processors
// wait for work. So a claimed task waits only for tasks with lower tickets, which run: no cycle.

struct SchedulerScratch {  // local_experts words each
  u32* rows;         // per local expert, over all sources
  u32* first_group;  // groups of the experts before
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
      here = wait_word(call, Await::counts, u32(source), words + 1 + slot, &scratch.first_group[slot]);
      segment(call, source, u32(slot)).rows = scratch.first_group[slot];
      scratch.rows[slot] += scratch.first_group[slot];
    }
    if (group.any(!here)) return false;
    exclusive_scan(group, scratch.first_group, scratch.spare, experts);
    for (int slot = group.lane; slot < experts; slot += group.size)
      segment(call, source, u32(slot)).first = scratch.first_group[slot];
    group.sync();
  }
  return true;
}

// The sum of count(slot) over the local experts; every lane gets it.
template <class Group, class Count>
DEVICE u32 total_of(Group& group, const SchedulerScratch& scratch, int experts, Count count) {
  for (int slot = group.lane; slot < experts; slot += group.size) scratch.first_group[slot] = count(slot);
  return exclusive_scan(group, scratch.first_group, scratch.spare, experts);
}

// Group `m` in expert order; `height` rows make a full one.
DEVICE ReadyBlock group_at(const SchedulerScratch& scratch, int experts, u32 height, u32 m) {
  int low = 0, high = experts - 1;  // the last expert whose first group is <= m (experts without rows share it with the next)
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (scratch.first_group[middle] <= m) low = middle;
    else high = middle - 1;
  }
  const u32 first_row = (m - scratch.first_group[low]) * height;
  const u32 rest = scratch.rows[low] - first_row;
  return ReadyBlock{u32(low), first_row, rest < height ? rest : height, 0};
}

// Rows of a source arrive in token order, so its last row of the group decides.
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
  u32 group = 1;    // M-blocks of a full group
  u32 lag = 0;      // groups between a GEMM1 and its GEMM2
  u32 groups = 0;   // to be appended in this call
  u32 entries = 0;  // written
  u32 issued = 0;   // groups whose GEMM1 is in the queue
  u32 second = 0;   // groups whose GEMM2 is in the queue
  u32 units = 0;    // M-blocks of the issued groups
  u32 retired = 0;  // leading M-blocks whose GEMM2 is finished: their ring slots are free
};

// How many M-blocks share their weight tiles: as many as an active expert has on average.
DEVICE u32 group_size(u32 blocks, u32 active, u32 most) {
  const u32 share = active == 0 ? 1 : blocks / active;
  return share < 1 ? 1 : share < most ? share : most;
}

// Append the ready ones of groups [base, base + group.size).
template <class Group>
DEVICE void append_ready(Group& group, const Call& call, const SchedulerScratch& scratch, Queue& queue, u32 base) {
  const MoEArgs& args = call.args;
  const u32 m = base + group.lane;
  const bool candidate = m < queue.groups && args.appended[m] != call.epoch;
  ReadyBlock block{};
  if (candidate) block = group_at(scratch, args.local_experts, queue.group * kBlockM, m);
  const bool ready = candidate && rows_arrived(call, block);
  u32 total = 0;
  const u32 rank = group.exclusive_count(ready, &total);
  const u32 room = (u32(args.ring_slots) - (queue.units - queue.retired)) / queue.group;
  const u32 taken = total < room ? total : room;
  // Every group takes the slots of a full one: M-blocks that are not there count as finished.
  if (ready && rank < taken) {
    const u32 issue = queue.issued + rank;
    const int second = int(issue) - int(queue.lag);
    block.unit = queue.units + rank * queue.group;
    args.appended[m] = call.epoch;
    args.ready[issue] = block;
    for (u32 i = (block.rows + kBlockM - 1) / kBlockM; i < queue.group; ++i)
      store_relaxed(call.gemm2_done(block.unit + i), u32(kGemm2Tiles));
    args.entries[queue.entries + rank] = QueueEntry{second >= int(queue.second) ? second : -1, int(issue)};
  }
  queue.entries += taken;
  queue.issued += taken;
  queue.units += taken * queue.group;
  const int second = int(queue.issued) - int(queue.lag);
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
  const int experts = args.local_experts;
  const auto in_parts_of = [&](u32 height) {
    return total_of(group, scratch, experts, [&](int slot) { return (scratch.rows[slot] + height - 1) / height; });
  };
  const u32 rows = total_of(group, scratch, experts, [&](int slot) { return scratch.rows[slot]; });
  const u32 active = total_of(group, scratch, experts, [&](int slot) { return u32(scratch.rows[slot] != 0); });
  const u32 blocks = in_parts_of(kBlockM);

  Queue queue;
  queue.group = group_size(blocks, active, u32(args.max_group));
  queue.lag = (u32(args.lag) + queue.group - 1) / queue.group;
  queue.groups = in_parts_of(queue.group * kBlockM);  // leaves first_group as group_at() reads it
  if (group.lane == 0) call.counters().group = queue.group;  // published with the first entries

  u32 first = 0;  // every group before it is appended; the sweep starts here
  while (queue.second < queue.groups) {
    const u32 next = queue.retired + group.lane;
    const bool done = next < queue.units && load_acquire<Scope::device>(call.gemm2_done(next)) == u32(kGemm2Tiles);
    queue.retired += group.leading(done);
    const u32 before = queue.entries;
    for (u32 base = first; base < queue.groups && queue.issued < queue.groups; base += group.size) {
      if (u32(args.ring_slots) - (queue.units - queue.retired) < queue.group) break;
      append_ready(group, call, scratch, queue, base);
    }
    // Nothing new: hand out a held-back GEMM2 if all GEMM1 are out, or if a processor waits.
    const u32 asked = load_relaxed(&call.counters().task_ticket);
    const u32 offered = queue.entries * queue.group * u32(kGemm1Tiles + kGemm2Tiles);
    const bool idle = group.broadcast(asked, 0) >= offered;
    if (queue.second < queue.issued && (queue.issued == queue.groups || (queue.entries == before && idle))) {
      if (group.lane == 0) args.entries[queue.entries] = QueueEntry{int(queue.second), -1};
      ++queue.entries;
      ++queue.second;
    }
    if (queue.entries != before) publish_entries(group, call, queue, false);
    else backoff(0);
    const u32 m = first + group.lane;  // lanes see each other's appends since publish_entries()
    first += group.leading(m < queue.groups && args.appended[m] == call.epoch);
    if (group.any(aborted(call))) return;  // whoever waits for remote events (the subscriber) or for tasks has the deadline
  }
  publish_entries(group, call, queue, true);
  if (group.lane == 0) {
    fetch_add_relaxed(&args.state->rows, u64(rows));
    fetch_add_relaxed(&args.state->blocks, u64(blocks));
  }
}
