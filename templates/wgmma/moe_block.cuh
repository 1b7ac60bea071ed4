// ---- Block program: how the clusters run tasks ------------------------------------------------------------------------
// A processor is a cluster. A claim gives each of its blocks a task: an M-block, and all multiply the same weights, or, where
// one M-block has all rows, a tile or a part of the columns of one. A block is one warpgroup that fetches tasks and loads, and
// two that multiply. The loading warps have one job each: fetch (claim a ticket, wait for its entry, look up its rows),
// weights, rows, publish. They wait for each other and for the consumers through mbarriers alone, so each is as far ahead as
// its input allows.
// The multiprocessor's registers, given to who needs them: the sums of a consumer are kBlockN / 2 of its registers.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr int kLoaderRegisters = ${plan.loader_registers};
constexpr int kConsumerRegisters = ${plan.consumer_registers};
static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);

constexpr u32 kSlots = sizeof(BlockState::slot) / sizeof(TaskSlot);

constexpr u32 kConsumerBarrier = 1, kLoaderBarrier = 2;  // 0 is __syncthreads()
constexpr u32 kSlotUsers = 32 * (3 + kConsumerWarps);  // lanes that read a task: for weights, rows, publish, consumers

DEVICE void init_barriers(BlockState& state, const Pipeline& pipeline) {
  pipeline.init();
  mbarrier_init(shared_address(&state.near_end), 1);
  for (u32 side = 0; side < kSlots; ++side) {
    mbarrier_init(shared_address(&state.slot_full[side]), 32);  // every lane of the fetch warp publishes its rows
    // Behind its own users the first block waits for the others to have read the claim.
    mbarrier_init(shared_address(&state.slot_empty[side]), kSlotUsers + (cluster_ctarank() == 0 ? kCluster - 1 : 0));
    mbarrier_init(shared_address(&state.stored[side]), kConsumerWarps);
    mbarrier_init(shared_address(&state.mail_full[side]), 1);
  }
  fence_mbarrier_init();
}

// By the first block of a cluster: the next task, also sent to the others. It alone decides that there are no more.
DEVICE Task claim_for_all(const Call& call, BlockState& state, u32 side) {
  const Task task = claim_task(call);
  uint4 words[2];
  memcpy(words, &task, sizeof task);
  for (u32 block = 1; block < kCluster; ++block) {
    const u32 mail = mapa(shared_address(&state.mail[side]), block);
    st_shared_cluster_v4(mail, words[0]);
    st_shared_cluster_v4(mail + 16, words[1]);
    mbarrier_arrive_release_cluster(mapa(shared_address(&state.mail_full[side]), block));  // passes on what the claim acquired
  }
  return task;
}

DEVICE Task receive_task(const BlockState& state, const Turn<kSlots>& turn) {
  while (!mbarrier_try_wait_parity_cluster(shared_address(&state.mail_full[turn.index]), turn.phase)) {
  }
  uint4 words[2];
  static_assert(sizeof words == sizeof(Task));
  memcpy(words, &state.mail[turn.index], sizeof words);
  Task task;
  memcpy(&task, words, sizeof task);
  return task;
}

// A claim binds a task to this cluster, so none is made before its loads can soon begin: another may be idle.
DEVICE void fetch_tasks(const Call& call, BlockState& state) {
  WarpGroup warp;
  Turn<kSlots> turn;
  Turn<1> claimed;
  const u32 member = cluster_ctarank();
  while (true) {
    TaskSlot& slot = state.slot[turn.index];
    wait_barrier(shared_address(&state.slot_empty[turn.index]), turn.phase ^ 1);
    if (warp.lane == 0) {
      const Span span(call, Work::fetch, true);
      slot.task = share_of(member == 0 ? claim_for_all(call, state, turn.index) : receive_task(state, turn), member);
      slot.spoiled = 0;
    }
    warp.sync();  // the lanes below read what the scheduler published after lane 0 acquired it
    const TaskKind kind = slot.task.kind;
    look_up_rows(warp, call, slot);
    mbarrier_arrive(shared_address(&state.slot_full[turn.index]));
    if (kind == TaskKind::closed) return;
    if (member != 0 && warp.lane == 0)  // the mail has been read
      mbarrier_arrive_release_cluster(mapa(shared_address(&state.slot_empty[turn.index]), 0));
    turn.advance();
    if (member != 0) continue;
    wait_barrier(shared_address(&state.near_end), claimed.phase);
    claimed.advance();
  }
}

// Weight, row and consumer warps: run(slot) for each task, in ticket order, until there are no more; then, by one lane and
// after the slot was given back, done(its side).
template <class Run, class Done>
DEVICE void each_task(BlockState& state, Run run, Done done) {
  Turn<kSlots> turn;
  while (true) {
    TaskSlot& slot = state.slot[turn.index];
    wait_barrier(shared_address(&state.slot_full[turn.index]), turn.phase);
    if (slot.task.kind == TaskKind::closed) return;
    run(slot);
    __syncwarp();
    mbarrier_arrive(shared_address(&state.slot_empty[turn.index]));
    if (threadIdx.x % 32 == 0) done(turn.index);
    turn.advance();
  }
}

// As each_task, but the slot is given back before the task is published.
DEVICE void publish_tasks(const Call& call, BlockState& state) {
  Turn<kSlots> turn;
  while (true) {
    const TaskSlot& slot = state.slot[turn.index];
    wait_barrier(shared_address(&state.slot_full[turn.index]), turn.phase);
    const Task task = slot.task;
    if (task.kind == TaskKind::closed) return;
    wait_barrier(shared_address(&state.stored[turn.index]), turn.phase);
    const bool publish = task.block.rows != 0 && slot.spoiled == 0;
    mbarrier_arrive(shared_address(&state.slot_empty[turn.index]));
    turn.advance();
    if (publish) publish_task(call, task);
  }
}

DEVICE void load_tasks(const Call& call, const Maps& maps, BlockState& state, const Pipeline& pipeline) {
  const u32 warp = threadIdx.x / 32;
  StageTurn turn;
  if (warp == 0) {
    fetch_tasks(call, state);
  } else if (warp == 1) {
    const auto near_end = [&] { mbarrier_arrive(shared_address(&state.near_end)); };
    const auto load = [&](const TaskSlot& slot) {
      if (threadIdx.x % 32 != 0) return;
      if (is_split(slot.task)) load_task_weights<true>(call, maps, slot.task, pipeline, turn, near_end);
      else load_task_weights<false>(call, maps, slot.task, pipeline, turn, near_end);
    };
    each_task(state, load, [](u32) {});
  } else if (warp == 2) {
    const auto load = [&](TaskSlot& slot) {
      if (is_split(slot.task)) load_task_rows<true>(call, maps, slot, pipeline, turn);
      else load_task_rows<false>(call, maps, slot, pipeline, turn);
    };
    each_task(state, load, [](u32) {});
  } else {
    publish_tasks(call, state);
  }
}

DEVICE void consume_tasks(const Call& call, BlockState& state, char* work, const Pipeline& pipeline) {
  StageTurn turn;
  const auto consume = [&](const TaskSlot& slot) {
    if (is_split(slot.task)) consume_task<true>(call, slot, work, pipeline, turn);
    else consume_task<false>(call, slot, work, pipeline, turn);
  };
  each_task(state, consume, [&](u32 side) {  // the warp's stores, this arrival, the publisher's release: in this order
    mbarrier_arrive(shared_address(&state.stored[side]));
  });
}

// Before a block uses the barriers of another they must be there, and both must have got so far.
DEVICE bool all_able(BlockState& state, bool able) {
  if constexpr (kCluster == 1) return able;
  barrier_cluster();  // a block has shared memory once it runs
  if (threadIdx.x < kCluster) st_shared_cluster(mapa(shared_address(&state.able[cluster_ctarank()]), threadIdx.x), able);
  barrier_cluster();
  u32 all = 1;
  for (u32 block = 0; block < kCluster; ++block) all &= state.able[block];
  return all != 0;
}

// The other blocks of the OS's cluster have no tasks.
DEVICE void wait_for_close(const Call& call) {
  wait_until(
      call, Await::task, 0, kClosed, [&] { return load_relaxed(&call.counters().queue); },
      [&](u64 queue) { return (queue & kClosed) != 0; });
}

struct WgmmaParty : BlockParty {
  const Maps maps;
  BlockState& state;

  // Every block of a cluster comes here, able or not: the others wait for it.
  DEVICE void run_tasks(const Call& call, bool able) const {
    if (blockIdx.x < gridDim.x - kCluster) run_roles(able);
    else if (threadIdx.x == 0) wait_for_close(call);
    group.sync();
  }

  DEVICE void give_up() const {
    if (blockIdx.x < gridDim.x - kCluster) all_able(state, false);
  }

  DEVICE void run_roles(bool able) const {
    const Pipeline pipeline{shared_address(work), shared_address(state.stage_full), shared_address(state.stage_empty)};
    if (threadIdx.x == 0) init_barriers(state, pipeline);
    fence_proxy_async_shared();  // the planner's scratch was written by ordinary stores, TMA writes over it
    group.sync();
    if (!all_able(state, able)) return;
    if (threadIdx.x < 128) {
      setmaxnreg_dec<kLoaderRegisters>();
      load_tasks(call(Role::processor), maps, state, pipeline);
      bar_sync(kLoaderBarrier, 128);
      setmaxnreg_inc<kLaunchRegisters>();  // waits until the consumers have given theirs back
    } else {
      setmaxnreg_inc<kConsumerRegisters>();
      consume_tasks(call(Role::processor), state, work, pipeline);
      bar_sync(kConsumerBarrier, kConsumerThreads);
      setmaxnreg_dec<kLaunchRegisters>();
    }
    if constexpr (kCluster > 1) barrier_cluster();  // the others use this block's shared memory until they are done
  }
};

extern "C" __global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, ${plan.min_blocks})
    ${name}(
        const __grid_constant__ MoEArgs args, const __grid_constant__ TensorMap gate_map,
        const __grid_constant__ TensorMap up_map, const __grid_constant__ TensorMap down_map,
        const __grid_constant__ TensorMap ring_map) {
  extern __shared__ __align__(1024) char work[];
  BlockState& state = *reinterpret_cast<BlockState*>(work + kWorkBytes);
  WgmmaParty party{{args, work, {state.sums}}, {&gate_map, &up_map, &down_map, &ring_map}, state};
  if (threadIdx.x == 0) party.maps.prefetch();
  run_party(party);
}
