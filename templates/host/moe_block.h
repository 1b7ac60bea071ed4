// ---- Block program: one thread per role ------------------------------------------------------------------------------
DEVICE Task fetch_task(const Call& call) {
  const Span span(call, Work::fetch, true);
  return claim_task(call);
}

// One member after the other; on a GPU they are blocks, so anything may come between. False when the call is aborted.
DEVICE bool run_task(const Call& call, const Task& task, TileScratch& scratch) {
  for (u32 member = 0; member < kCluster; ++member) {
    const Task share = share_of(task, member);
    if (share.block.rows == 0) continue;
    protocol_point();
    if (task.kind == TaskKind::gemm1) gemm1_tile(call, share, scratch);
    if (task.kind == TaskKind::gemm2 && !gemm2_tile(call, share, scratch)) return false;
  }
  return true;
}

// Thread 0 schedules, thread 1 subscribes, the others process.
struct ThreadParty {
  using Lanes = Group;
  static constexpr int kLanes = 1;
  const MoEArgs& args;
  u32 thread, threads;
  Group group{};
  alignas(16) char memory[sizeof(PlannerScratch) > sizeof(SystemScratch) ? sizeof(PlannerScratch) : sizeof(SystemScratch)];

  bool is_system() const { return thread < 2; }
  Role role() const { return thread == 0 ? Role::scheduler : thread == 1 ? Role::subscriber : Role::processor; }
  int processor() const { return int(thread) - 2; }
  int processors() const { return int(threads) - 2; }
  u32 parties() const { return threads; }
  Call call(Role role) const { return begin_call(args, thread, threads, role); }
  template <class T>
  T& scratch() { return *reinterpret_cast<T*>(memory); }

  void give_up() const {}
  void run_tasks(const Call& call, bool able) const {
    if (!able) return;
    TileScratch tile;
    while (true) {
      const Task task = fetch_task(call);
      if (task.kind == TaskKind::closed || !run_task(call, task, tile)) return;
    }
  }
};

extern "C" void ${name}(
    const void* packed, u32 thread, u32 threads, const HostRuntime* lent) {
  runtime = lent;
  ThreadParty party{*static_cast<const MoEArgs*>(packed), thread, threads};
  run_party(party);
}
