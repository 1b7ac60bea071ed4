// ---- The queue: which task a ticket stands for ------------------------------------------------------------------------
// Numbers in, numbers out: nothing here reads memory or waits. The queue is a list of entries, each with a panel for every
// phase. A panel is up to `panel` neighbouring M-blocks of one expert; a column tile of all of them comes before the next
// tile, so that a weight tile is read from memory once. An entry has a ticket for every kCluster M-blocks of every tile.
// Where a task's columns begin and how many it has, when a whole tile has `width`.
DEVICE int first_column(const Task& task, int width) {
  return int(task.column) * width + int(task.part) * (width / kCluster);
}
DEVICE int columns_of(const Task& task, int width) { return task.share == Share::columns ? width / kCluster : width; }

// The queue's word: published entries; above them the M-blocks of a full panel, 0 until the first entry or the last; kClosed
// when no entry follows.
constexpr u64 kClosed = u64(1) << 63;
DEVICE u64 queue_word(u32 entries, u32 panel, bool closed) { return u64(panel) << 32 | entries | (closed ? kClosed : 0); }

DEVICE constexpr u32 tiles_before(u32 phase) {  // of an M-block
  u32 tiles = 0;
  for (u32 i = 0; i < phase; ++i) tiles += u32(kPhases[i].tiles);
  return tiles;
}
constexpr u32 kPanelTiles = tiles_before(kNumPhases);
constexpr u32 kLastTiles = u32(kPhases[kNumPhases - 1].tiles);
constexpr u32 kDoneParts = kLastTiles * kCluster;  // parts of tiles of the last phase: an M-block with so many is done

// The phase of the tile that comes at `tile` of all of an M-block's, and where the phase begins among them.
struct PhaseOfTile {
  u32 phase, first;
};
template <u32 kPhase = 0>
DEVICE PhaseOfTile phase_of(u32 tile) {
  constexpr u32 kFirst = tiles_before(kPhase), kNext = tiles_before(kPhase + 1);
  if constexpr (kPhase + 1 < kNumPhases)
    if (tile >= kNext) return phase_of<kPhase + 1>(tile);
  return {kPhase, kFirst};
}
template <u32 kPhase = 0>
DEVICE u32 tiles_of(TaskKind kind) {
  constexpr u32 kTiles = u32(kPhases[kPhase].tiles);
  if constexpr (kPhase + 1 < kNumPhases)
    if (u32(kind) != kPhase) return tiles_of<kPhase + 1>(kind);
  return kTiles;
}

DEVICE u32 entry_tickets(u32 panel) { return panel / kCluster * kPanelTiles; }

enum class Found { waiting, task, closed };  // an entry to come, one that is there, none

struct Position {
  Found found;
  u32 entry;
  TaskKind kind;  // the phase
  u32 column;     // tile of the phase
  u32 block;      // of the panel: the first of kCluster
};

DEVICE Position decode(u32 ticket, u64 queue) {
  Position at{(queue & kClosed) != 0 ? Found::closed : Found::waiting, 0, TaskKind::closed, 0, 0};
  const u32 claims = u32((queue & ~kClosed) >> 32) / kCluster;  // of a tile of the panel
  if (claims == 0) return at;
  at.entry = ticket / (claims * kPanelTiles);
  if (at.entry >= u32(queue)) return at;
  const u32 offset = ticket - at.entry * claims * kPanelTiles;
  const u32 tile = offset / claims;
  const PhaseOfTile of = phase_of(tile);
  at.found = Found::task;
  at.kind = TaskKind(of.phase);
  at.column = tile - of.first;
  at.block = offset % claims * kCluster;
  return at;
}

// The task at a position whose entry has `panel` for that phase: a tile of kCluster M-blocks, in one Task that has the rows of
// all; where one M-block has all rows, a tile or kCluster of them. Without rows when the panel has no such M-blocks or an earlier
// ticket has this tile.
DEVICE Task task_at(const Position& at, const ReadyBlock& panel) {
  Task task{at.kind, panel.serial + at.block, at.column, false, Share::rows, 0, {}};
  const u32 before = at.block * kBlockM;
  if (before >= panel.rows) return task;
  constexpr u32 kMost = kCluster * kBlockM;
  const u32 first_row = panel.first_row + before, rest = panel.rows - before;
  task.once = first_row == 0 && rest < kMost;
  // With the first rows of an expert weights come from memory: the more loads are small, the better they keep it busy. With the
  // last of many they come from L2, as fast as a block can take them: the fewer tasks the better.
  if (kCluster > 1 && rest <= u32(kBlockM))
    task.share = first_row == 0 && rest <= u32(kSplitRows) ? Share::columns : Share::tiles;
  if (task.share == Share::tiles && at.column % kCluster != 0) return task;
  task.block = ReadyBlock{panel.expert_slot, first_row, rest < kMost ? rest : kMost, task.serial};
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
    if (task.column >= tiles_of(task.kind)) task.block.rows = 0;
  } else {
    const u32 share = (rows + kCluster - 1) / kCluster, rest = rows - member * share;
    task.serial += member;
    task.block = ReadyBlock{
        task.block.expert_slot, task.block.first_row + member * share, rest < share ? rest : share, task.serial};
  }
  return task;
}

// ---- How the M-blocks of a call form panels ----
// How many M-blocks share their weight tiles: as many as an active expert has on average, in whole claims.
DEVICE u32 panel_size(u32 blocks, u32 active, u32 most) {
  const u32 share = active == 0 ? 1 : (blocks + active - 1) / active;
  const u32 whole = (share + kCluster - 1) / kCluster * kCluster;
  return whole < most ? whole : most;
}

// M-blocks that so many rows of an expert take: kCluster for each claim, but one for a last claim that has no more rows.
DEVICE u32 blocks_of(u32 rows) {
  constexpr u32 kMost = kCluster * kBlockM;
  const u32 rest = rows % kMost;
  return rows / kMost * kCluster + (rest == 0 ? 0 : rest <= u32(kBlockM) ? 1 : kCluster);
}

// The lag in panels that have so many M-blocks: as many tasks between two phases of one as `lag` single M-blocks put there.
DEVICE u32 panel_lag(u32 lag, u32 blocks) {
  if (lag == 0) return 0;
  const u32 between = lag * kPanelTiles - kLastTiles;
  return ((between + blocks - 1) / blocks + kLastTiles + kPanelTiles - 1) / kPanelTiles;
}
