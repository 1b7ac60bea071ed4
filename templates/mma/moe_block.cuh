// ---- Block program: how a block runs its tasks -------------------------------------------------------------------------
// A processor is kMmaWarps warps that run tasks and one that fetches them: it claims the next ticket, waits for its entry
// and looks up its rows while the current task runs. It may wait there, because the current task needs nothing of it.
static_assert(kCluster == 1, "a claim is one block's");

// Slots are handed over with named barriers on which one side waits and the other only arrives. Their numbers are
// constants: for a computed one ptxas would reserve all 16.
constexpr u32 kFullBarrier = 2;   // + slot
constexpr u32 kEmptyBarrier = 4;  // + slot

DEVICE void wait_slot(u32 barrier, u32 side) {
  if (side == 0) bar_sync(barrier, kThreads);
  else bar_sync(barrier + 1, kThreads);
}
DEVICE void hand_over_slot(u32 barrier, u32 side) {
  if (side == 0) bar_arrive(barrier, kThreads);
  else bar_arrive(barrier + 1, kThreads);
}

DEVICE void fetch_tasks(const Call& call, TaskSlot* slots) {
  WarpGroup warp;
  for (u32 turn = 0;; ++turn) {
    const u32 side = turn % 2;
    TaskSlot& slot = slots[side];
    if (turn >= 2) wait_slot(kEmptyBarrier, side);
    if (warp.lane == 0) {
      const Span span(call, Work::fetch, true, turn);
      slot.task = claim_task(call);
    }
    warp.sync();  // the lanes below read what the scheduler published after lane 0 acquired it
    const TaskKind kind = slot.task.kind;
    look_up_rows(warp, call, slot);
    hand_over_slot(kFullBarrier, side);
    if (kind != TaskKind::closed) continue;
    if (turn != 0) wait_slot(kEmptyBarrier, side ^ 1);  // of the last task: no barrier is left half-arrived
    return;
  }
}

DEVICE void run_slots(const Call& call, TaskSlot* slots, char* work) {
  for (u32 turn = 0;; ++turn) {
    const u32 side = turn % 2;
    wait_slot(kFullBarrier, side);
    const TaskKind kind = slots[side].task.kind;
    if (kind == TaskKind::closed) return;
    if (kind == TaskKind::gemm1) gemm1_tile(call, slots[side], work);
    if (kind == TaskKind::gemm2) gemm2_tile(call, slots[side], work);
    sync_mma();  // an arrival alone does not order the reads before it
    hand_over_slot(kEmptyBarrier, side);
  }
}

struct MmaParty : BlockParty {
  BlockState& state;

  DEVICE void run_tasks(const Call&, bool able) const {
    if (!able) return;  // else read again: what planning has kept in registers would take them from the products
    if (threadIdx.x < kMmaThreads) run_slots(call(Role::processor), state.slot, work);
    else fetch_tasks(call(Role::processor), state.slot);
  }
  DEVICE void give_up() const {}
};

extern "C" __global__ void __launch_bounds__(kThreads, ${plan.min_blocks})
${name}(const __grid_constant__ MoEArgs args) {
  extern __shared__ __align__(1024) char work[];
  BlockState& state = *reinterpret_cast<BlockState*>(work + kWorkBytes);
  MmaParty party{{args, work, {state.sums}}, state};
  run_party(party);
}
