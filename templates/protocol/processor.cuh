// ---- Processors: claim a ticket, wait until its task exists, run it, publish the result -------------------------------
enum class TaskKind : u32 { gemm1, gemm2, closed };

struct Task {
  TaskKind kind;
  u32 issue;    // which M-block, in the order of the queue
  u32 column;   // tile
  bool once;    // no other claim reads its weight tile
  bool shared;  // the members multiply the same weights, each an M-block of its own
  ReadyBlock block;
};
static_assert(sizeof(Task) == 32);

// What a ticket stands for, once the scheduler has published its entry: a column tile of kCluster neighbouring M-blocks, in
// one Task that has the rows of all; or, where one M-block has all rows, kCluster column tiles of it. False when it stands for
// nothing: the group has no such M-blocks, or an earlier ticket has this column. TaskKind::closed when no more tasks come.
DEVICE bool wait_ready(const Call& call, u32 ticket, Task& task) {
  task = Task{TaskKind::closed, 0, 0, false, false, {}};
  constexpr u32 kTiles = kGemm1Tiles + kGemm2Tiles;
  u32 claims = 1, index = 0;  // of a column of the group
  bool exists = false;
  const bool waited = wait_until(
      call, Await::task, ticket, u64(ticket), [&] { return load_acquire<Scope::device>(&call.counters().queue); },
      [&](u64 queue) {
        claims = u32((queue & ~kClosed) >> 32) / kCluster;
        if (claims != 0) index = ticket / (claims * kTiles);
        exists = claims != 0 && u32(queue) > index;
        return exists || (queue & kClosed) != 0;
      });
  if (!waited || !exists) return true;
  const u32 part = ticket - index * claims * kTiles;
  const u32 column = part / claims, member = part % claims * kCluster;  // the group's M-blocks follow each other: one weight tile
  const bool second = column >= u32(kGemm1Tiles);
  const ReadyBlock whole = call.args.entries[2 * u64(index) + second];
  const u32 first_row = whole.first_row + member * kBlockM;
  if (member * kBlockM >= whole.rows) return false;
  constexpr u32 kMost = kCluster * kBlockM;
  const u32 rest = whole.rows - member * kBlockM;
  task.kind = second ? TaskKind::gemm2 : TaskKind::gemm1;
  task.issue = whole.unit + member;
  task.column = second ? column - kGemm1Tiles : column;
  task.once = first_row == 0 && rest < kMost;
  task.shared = kCluster > 1 && rest > kBlockM;
  task.block = ReadyBlock{whole.expert_slot, first_row, rest < kMost ? rest : kMost, task.issue};
  return task.shared || task.column % kCluster == 0;
}

// By one lane: a ticket for the next task, and the wait until that exists.
DEVICE Task claim_task(const Call& call) {
  Task task;
  while (!wait_ready(call, fetch_add_relaxed(&call.counters().task_ticket, 1u), task)) {
  }
  if (aborted(call)) task.kind = TaskKind::closed;
  return task;
}

// The part of a member: an equal share of the rows, so that all end together, or a column tile. Past the last column it has
// no rows: then there is nothing to do and nothing to publish.
DEVICE Task share_of(Task task, u32 member) {
  const u32 rows = task.block.rows;
  if (task.shared) {
    const u32 share = (rows + kCluster - 1) / kCluster;
    const u32 rest = rows - member * share;
    task.issue += member;
    task.block = ReadyBlock{
        task.block.expert_slot, task.block.first_row + member * share, rest < share ? rest : share, task.issue};
  } else {
    task.column += member;
    if (task.column >= u32(task.kind == TaskKind::gemm1 ? kGemm1Tiles : kGemm2Tiles)) task.block.rows = 0;
  }
  return task;
}

// A GEMM1 tile is in the ring: set its bit. Pairs with wait_gemm1().
DEVICE void publish_gemm1(const Call& call, const Task& task) {
  delay(call);
  fetch_or_release(call.column_bits(task.issue) + task.column / 32, 1u << task.column % 32);
}

// GEMM2's k loop polls only for the GEMM1 tile whose columns it reads next.
DEVICE bool wait_gemm1(const Call& call, u32 issue, u32 column) {
  const u32* word = call.column_bits(issue) + column / 32;
  const u32 bit = 1u << column % 32;
  return wait_until(
      call, Await::gemm1, column, bit, [&] { return u64(load_acquire<Scope::device>(word)); },
      [&](u64 bits) { return (u32(bits) & bit) != 0; });
}

// A GEMM2 tile is stored; true for the one that finished the M-block, which then calls return_rows().
DEVICE bool publish_gemm2(const Call& call, const Task& task) {
  delay(call);
  return fetch_add_acq_rel(call.gemm2_done(task.issue), 1u) + 1 == u32(kGemm2Tiles);
}
