// ---- Scheduler: appends work to the task queue as soon as nothing remote is missing for it -----------------------------
// A panel is appended when all its rows are here and its M-blocks hold slots of the intermediate ring; its next phase follows
// `lag` panels later, or at once when processors wait for work. So a claimed task waits only for tasks with lower tickets,
// which run: no cycle.

// Panel `m` in expert order; `height` rows make a full one.
DEVICE ReadyBlock panel_at(const SystemScratch& scratch, int experts, u32 height, u32 m) {
  int low = 0, high = experts - 1;  // the last expert whose first panel is <= m (experts without rows share it with the next)
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (scratch.first_panel[middle] <= m) low = middle;
    else high = middle - 1;
  }
  const u32 first_row = (m - scratch.first_panel[low]) * height;
  const u32 rest = scratch.rows[low] - first_row;
  return ReadyBlock{u32(low), first_row, rest < height ? rest : height, 0};
}

// Nothing is on its way any more, from any source.
template <class Group>
DEVICE bool all_arrived(Group& group, const Call& call) {
  bool here = true;
  for (int source = group.lane; source < call.args.world_size; source += group.size)
    here = here && load_acquire<Scope::device>(&call.counters().arrived[source]) == kAllChunks;
  return !group.any(!here);
}

// Rows of a source arrive in token order, so its last row of the panel decides.
DEVICE bool rows_arrived(const Call& call, const ReadyBlock& block) {
  const MoEArgs& args = call.args;
  const Segment* const segments = segments_of(call, block.expert_slot);
  const u32 end = block.first_row + block.rows;
  for (int distance = distance_of(call, segments, block.first_row); distance < args.world_size; ++distance) {
    const Segment theirs = segments[distance];
    if (theirs.start >= end) break;
    if (theirs.rows == 0) continue;
    const u32 arrived = load_acquire<Scope::device>(&call.counters().arrived[theirs.source]);
    if (arrived == 0) return false;  // its list may not be here yet: not to be read before
    const u32 last = (end < theirs.start + theirs.rows ? end : theirs.start + theirs.rows) - 1 - theirs.start;
    const ListEntry entry = call.list(args.rank, int(theirs.source))[theirs.first + last];
    if ((entry.token_slot >> 8) / kChunkTokens >= arrived) return false;
  }
  return true;
}

struct Queue {
  u32 panel = 1;    // M-blocks of a full panel
  u32 lag = 0;      // panels between two phases of one
  u32 panels = 0;   // to be appended in this call
  u32 entries = 0;  // written
  u32 highest = 0;  // no panel from here on is
  u32 blocks = 0;   // M-blocks of the issued panels: the next serial
  u32 retired = 0;  // leading M-blocks that are done: their ring slots are free
  bool all_here = false;  // all rows of all sources
  u32 issued[kNumPhases] = {};  // leading panels whose tasks of that phase are in the queue; never more than of the one before

  DEVICE u32 held_back() const { return issued[0] - issued[kNumPhases - 1]; }
};

// Append the ready ones of panels [base, base + group.size).
template <class Group>
DEVICE void append_ready(Group& group, const Call& call, const SystemScratch& scratch, Queue& queue, u32 base) {
  const MoEArgs& args = call.args;
  const u32 m = base + group.lane;
  const bool candidate = m < queue.panels && (m >= queue.highest || args.appended[m] != call.epoch);
  ReadyBlock block{};
  if (m < queue.panels) block = panel_at(scratch, args.local_experts, queue.panel * kBlockM, m);
  const bool ready = candidate && (queue.all_here || rows_arrived(call, block));
  const u32 room = u32(args.ring_slots) - (queue.blocks - queue.retired);
  const u32 blocks = ready ? blocks_of(block.rows) : 0;
  u32 total = 0, taken = 0;
  const u32 before = group.exclusive_sum(blocks, &total);
  const bool fits = ready && before + blocks <= room;
  const u32 order = group.exclusive_count(fits, &taken);
  if (fits) {
    block.serial = queue.blocks + before;
    args.appended[m] = call.epoch;
    args.ready[queue.issued[0] + order] = block;
  }
  group.sync();  // a later phase may be of a panel that another lane has just issued
  if (fits) {
    ReadyBlock* const entry = args.entries + kNumPhases * u64(queue.entries + order);
    entry[0] = block;
#pragma unroll
    for (u32 phase = 1; phase < kNumPhases; ++phase) {
      const int panel = int(queue.issued[0] + order) - int(phase * queue.lag);
      entry[phase] = panel >= int(queue.issued[phase]) ? args.ready[panel] : ReadyBlock{};
    }
  }
  if (taken != 0 && base + group.size > queue.highest) queue.highest = base + group.size;
  queue.entries += taken;
  queue.issued[0] += taken;
  queue.blocks += group.sum(fits ? blocks : 0);
#pragma unroll
  for (u32 phase = 1; phase < kNumPhases; ++phase) {
    const int panels = int(queue.issued[0]) - int(phase * queue.lag);
    if (panels > int(queue.issued[phase])) queue.issued[phase] = u32(panels);
  }
}

template <class Group>
DEVICE void publish_entries(Group& group, const Call& call, const Queue& queue, bool closed) {
  const Span span(call, Work::append, group.lane == 0, queue.entries);
  group.sync();
  delay(call);
  if (group.lane == 0)  // pairs with wait_task() of the processors
    store_release<Scope::device>(&call.counters().queue, queue_word(queue.entries, queue.panel, closed));
}

// How the M-blocks form panels; leaves first_panel as panel_at() reads it.
template <class Group>
DEVICE Queue plan_queue(Group& group, const Call& call, SystemScratch& scratch) {
  const MoEArgs& args = call.args;
  const int experts = args.local_experts;
  u32 rows = 0, blocks = 0, active = 0;
  for (int slot = group.lane; slot < experts; slot += group.size) {
    rows += scratch.rows[slot];
    blocks += blocks_of(scratch.rows[slot]);
    active += u32(scratch.rows[slot] != 0);
  }
  rows = group.sum(rows);
  blocks = group.sum(blocks);
  active = group.sum(active);
  Queue queue;
  queue.panel = panel_size(blocks, active, u32(args.max_panel));
  const u32 height = queue.panel * kBlockM;
  for (int slot = group.lane; slot < experts; slot += group.size)
    scratch.first_panel[slot] = (scratch.rows[slot] + height - 1) / height;
  queue.panels = exclusive_scan(group, scratch.first_panel, experts);
  queue.lag = queue.panels == 0 ? 0 : panel_lag(u32(args.lag), blocks / queue.panels);
  if (group.lane == 0) {
    fetch_add_relaxed(&args.state->rows, u64(rows));
    fetch_add_relaxed(&args.state->blocks, u64(blocks));
  }
  return queue;
}

// Entries for the next `count` panels whose later phases are held back.
template <class Group>
DEVICE void append_held_back(Group& group, const Call& call, Queue& queue, u32 count) {
  for (u32 i = group.lane; i < count; i += group.size) {
    ReadyBlock* const entry = call.args.entries + kNumPhases * u64(queue.entries + i);
    entry[0] = ReadyBlock{};
#pragma unroll
    for (u32 phase = 1; phase < kNumPhases; ++phase) {
      const u32 panel = queue.issued[phase] + i;
      entry[phase] = panel < queue.issued[0] ? call.args.ready[panel] : ReadyBlock{};
    }
  }
  queue.entries += count;
#pragma unroll
  for (u32 phase = 1; phase < kNumPhases; ++phase) {
    const u32 panels = queue.issued[phase] + count;
    queue.issued[phase] = panels < queue.issued[0] ? panels : queue.issued[0];
  }
}

template <class Group>
DEVICE void schedule(Group& group, const Call& call, SystemScratch& scratch) {
  const MoEArgs& args = call.args;
  if (!gather_counts(group, call, scratch)) return;
  Queue queue = plan_queue(group, call, scratch);
  u32 first = 0;  // every panel before it is appended; the sweep starts here
  while (queue.issued[kNumPhases - 1] < queue.panels) {
    const u32 next = queue.retired + group.lane;
    const bool done = next < queue.blocks && load_acquire<Scope::device>(call.done_parts(next)) == kDoneParts;
    queue.retired += group.leading(done);
    queue.all_here = queue.all_here || all_arrived(group, call);
    const u32 before = queue.entries;
    for (u32 base = first; base < queue.panels && queue.issued[0] < queue.panels; base += group.size) {
      if (u32(args.ring_slots) - (queue.blocks - queue.retired) < queue.panel) break;
      const u32 entries = queue.entries;
      append_ready(group, call, scratch, queue, base);
      if (queue.entries != entries) publish_entries(group, call, queue, false);
    }
    // The rest of the later phases when the first of all is out; nothing new while a processor waits: the next one's.
    if (queue.issued[0] == queue.panels) {
      append_held_back(group, call, queue, queue.held_back());
      publish_entries(group, call, queue, false);
    } else if (queue.entries == before && queue.held_back() != 0) {
      const u32 offered = queue.entries * entry_tickets(queue.panel);
      const bool idle = group.broadcast(load_relaxed(&call.counters().task_ticket), 0) >= offered;
      if (idle) {
        append_held_back(group, call, queue, 1);
        publish_entries(group, call, queue, false);
      }
    }
    if (queue.entries == before) backoff(0);
    const u32 m = first + group.lane;  // lanes see each other's appends since publish_entries()
    first += group.leading(m < queue.panels && args.appended[m] == call.epoch);
    if (group.any(aborted(call))) return;  // whoever waits for remote events (the subscriber) or for tasks has the deadline
  }
  publish_entries(group, call, queue, true);
}
