// ---- Processors: claim a ticket, wait until its task exists, run it, publish the result -------------------------------
enum class TaskKind : u32 { gemm1, gemm2, closed };

// How the members of a cluster share a claim.
enum class Share : unsigned char {
  rows,     // each has an M-block of its own: all multiply the same weights
  columns,  // each has a part of the columns of the tile
  tiles,    // each has a tile of its own, of neighbouring ones
};

struct Task {
  TaskKind kind;
  u32 serial;  // of its first M-block
  u32 column;  // tile
  bool once;   // no other claim reads its weight tile
  Share share;
  unsigned char part;  // of the columns of the tile, when they are shared
  ReadyBlock block;

  // Where its columns begin and how many it has, when a whole tile has `width`.
  DEVICE int first_column(int width) const { return int(column) * width + int(part) * (width / kCluster); }
  DEVICE int columns(int width) const { return share == Share::columns ? width / kCluster : width; }
};
static_assert(sizeof(Task) == 32);

// What a ticket stands for, once the scheduler has published its entry: a column tile of kCluster neighbouring M-blocks, in
// one Task that has the rows of all; where one M-block has all rows, a column tile or kCluster of them. False when it stands
// for nothing: the panel has no such M-blocks, or an earlier ticket has this tile. TaskKind::closed when no more tasks come.
DEVICE bool wait_ready(const Call& call, u32 ticket, Task& task) {
  task = Task{TaskKind::closed, 0, 0, false, Share::rows, 0, {}};
  constexpr u32 kTiles = kGemm1Tiles + kGemm2Tiles;
  u32 claims = 1, index = 0;  // of a column of the panel
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
  const u32 offset = ticket - index * claims * kTiles;
  const u32 column = offset / claims, block = offset % claims * kCluster;  // the panel's M-blocks follow each other: one weight tile
  const bool second = column >= u32(kGemm1Tiles);
  const ReadyBlock whole = call.args.entries[2 * u64(index) + second];
  const u32 first_row = whole.first_row + block * kBlockM;
  if (block * kBlockM >= whole.rows) return false;
  constexpr u32 kMost = kCluster * kBlockM;
  const u32 rest = whole.rows - block * kBlockM;
  task.kind = second ? TaskKind::gemm2 : TaskKind::gemm1;
  task.serial = whole.serial + block;
  task.column = second ? column - kGemm1Tiles : column;
  task.once = first_row == 0 && rest < kMost;
  // With the first rows of an expert weights come from memory: the more loads are small, the better they keep it busy. With the
  // last of many they come from L2, as fast as a block can take them: the fewer tasks the better.
  if (kCluster > 1 && rest <= u32(kBlockM))
    task.share = first_row == 0 && rest <= u32(kSplitRows) ? Share::columns : Share::tiles;
  task.block = ReadyBlock{whole.expert_slot, first_row, rest < kMost ? rest : kMost, task.serial};
  return task.share != Share::tiles || task.column % kCluster == 0;
}

// By one lane: a ticket for the next task, and the wait until that exists.
DEVICE Task claim_task(const Call& call) {
  Task task;
  while (!wait_ready(call, fetch_add_relaxed(&call.counters().task_ticket, 1u), task)) {
  }
  if (aborted(call)) task.kind = TaskKind::closed;
  return task;
}

// What a member does of it. Rows are shared equally, so that all end together. Past the last tile a member has no rows: there is
// nothing to do and nothing to publish.
DEVICE Task share_of(Task task, u32 member) {
  const u32 rows = task.block.rows;
  if (task.share == Share::columns) {
    task.part = static_cast<unsigned char>(member);
  } else if (task.share == Share::tiles) {
    task.column += member;
    if (task.column >= u32(task.kind == TaskKind::gemm1 ? kGemm1Tiles : kGemm2Tiles)) task.block.rows = 0;
  } else {
    const u32 share = (rows + kCluster - 1) / kCluster, rest = rows - member * share;
    task.serial += member;
    task.block = ReadyBlock{
        task.block.expert_slot, task.block.first_row + member * share, rest < share ? rest : share, task.serial};
  }
  return task;
}

// A GEMM1 tile is in the ring: set its bits. Pairs with wait_gemm1().
DEVICE void publish_gemm1(const Call& call, const Task& task) {
  delay(call);
  const u32 at = task.column * kCluster;
  const u32 bits = task.share == Share::columns ? 1u << task.part : (1u << kCluster) - 1;
  fetch_or_release(call.column_bits(task.serial) + at / 32, bits << at % 32);
}

// GEMM2's k loop polls only for the part of a GEMM1 tile whose columns it reads next.
DEVICE bool wait_gemm1(const Call& call, u32 serial, u32 part) {
  const u32* word = call.column_bits(serial) + part / 32;
  const u32 bit = 1u << part % 32;
  return wait_until(
      call, Await::gemm1, part, bit, [&] { return u64(load_acquire<Scope::device>(word)); },
      [&](u64 bits) { return (u32(bits) & bit) != 0; });
}

// A GEMM2 tile is stored; true for the one that finished the M-block, which then calls return_rows().
DEVICE bool publish_gemm2(const Call& call, const Task& task) {
  delay(call);
  const u32 parts = task.share == Share::columns ? 1 : kCluster;
  return fetch_add_acq_rel(call.gemm2_done(task.serial), parts) + parts == u32(kGemm2Parts);
}
