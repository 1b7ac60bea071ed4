// ---- Block program: the last block of the grid runs the OS, all others process ----------------------------------------
// A processor is kMmaWarps warps that run tasks and one that fetches them: it claims the next ticket, waits for its entry
// and looks up its rows while the current task runs. It may wait there, because the current task needs nothing of it.
constexpr int kThreads = ${plan.threads};
static_assert(kThreads == kMmaThreads + 32);
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

DEVICE void look_up_rows(const WarpGroup& warp, const Call& call, const Task& task, TaskSlot& slot) {
  const Span span(call, Work::resolve, warp.lane == 0, task.serial, task.column);
  each_row(warp, call, task.block, 0, int(task.block.rows), [&](int r, const Row& row) {
    slot.row[r] = task.kind == TaskKind::gemm1 ? input_row(call, row) : output_row(call, row);
    slot.weight[r] = row.entry.weight;
  });
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
    const Task task = slot.task;
    look_up_rows(warp, call, task, slot);
    hand_over_slot(kFullBarrier, side);
    if (task.kind != TaskKind::closed) continue;
    if (turn != 0) wait_slot(kEmptyBarrier, side ^ 1);  // of the last task: no barrier is left half-arrived
    return;
  }
}

DEVICE void run_tasks(const Call& call, TaskSlot* slots, char* work) {
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

DEVICE void process(BlockGroup& block, const Call& call, char* work, BlockState& state) {
  const int processors = int(gridDim.x) - 1;
  const int planners = num_planners(call, processors);
  if (int(blockIdx.x) < planners) {
    if (!plan_routes(block, call, int(blockIdx.x), planners, *reinterpret_cast<PlannerScratch*>(work))) return;
  }
  WarpGroup warp;
  if (block.any(!dispatch(warp, call, planners))) return;  // every warp claims chunks for itself
  if (threadIdx.x < kMmaThreads) run_tasks(call, state.slot, work);
  else fetch_tasks(call, state.slot);
  // What only the combine needs is read again rather than held in registers during the tasks.
  if (aborted(call)) return;
  const u32 blocks = grid_size();
  combine(warp, begin_call(call.args, blockIdx.x, blocks, Role::processor), (int(blocks) - 1) * (kThreads / 32));
}

DEVICE void run_system(const Call& call, char* work) {
  WarpGroup warp;
  SystemScratch& scratch = *reinterpret_cast<SystemScratch*>(work);
  if (call.role == Role::scheduler) schedule(warp, call, scratch);
  if (call.role == Role::subscriber) subscribe(warp, call, scratch.arrived);
}

extern "C" __global__ void __launch_bounds__(kThreads, ${plan.min_blocks})
${name}(const __grid_constant__ MoEArgs args) {
  extern __shared__ __align__(1024) char work[];
  BlockState& state = *reinterpret_cast<BlockState*>(work + kWorkBytes);
  BlockGroup block{state.sums};
  const bool system = blockIdx.x == gridDim.x - 1;
  const Role role = !system || threadIdx.x >= 64 ? Role::processor : threadIdx.x < 32 ? Role::scheduler : Role::subscriber;
  const Call call = begin_call(args, blockIdx.x, gridDim.x, role);
  const Span span(call, Work::kernel, threadIdx.x == 0);
  if (system) run_system(call, work);
  else process(block, call, work, state);
  // Read again rather than held in registers all along: the epoch stands until every block has left.
  const u32 blocks = grid_size();
  leave(block, begin_call(args, blockIdx.x, blocks, role), blockIdx.x, blocks);
}
