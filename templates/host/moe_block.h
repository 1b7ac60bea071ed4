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

DEVICE void process(Group& group, const Call& call, int processor, int processors) {
  const int planners = num_planners(call, processors);
  if (processor < planners) {
    PlannerScratch scratch;
    if (!plan_routes(group, call, processor, planners, scratch)) return;
  }
  if (!dispatch(group, call, planners)) return;
  TileScratch scratch;
  while (true) {
    const Task task = fetch_task(call);
    if (task.kind == TaskKind::closed) break;
    if (!run_task(call, task, scratch)) return;
  }
  if (!aborted(call)) combine(group, call, processors);
}

// Thread 0 schedules, thread 1 subscribes, the others process.
extern "C" void ${name}(
    const void* packed, u32 thread, u32 threads, const HostRuntime* lent) {
  runtime = lent;
  const MoEArgs& args = *static_cast<const MoEArgs*>(packed);
  const Role role = thread == 0 ? Role::scheduler : thread == 1 ? Role::subscriber : Role::processor;
  const Call call = begin_call(args, thread, threads, role);
  const Span span(call, Work::kernel, true);
  Group group;
  if (role == Role::scheduler) {
    SystemScratch scratch;
    schedule(group, call, scratch);
  } else if (role == Role::subscriber) {
    SystemScratch scratch;
    subscribe(group, call, scratch.arrived);
  } else {
    process(group, call, int(thread) - 2, int(threads) - 2);
  }
  leave(group, call, thread, threads);
}
