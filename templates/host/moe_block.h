// ---- Block program: one thread per role ------------------------------------------------------------------------------
DEVICE void process(Group& group, const Call& call, int processor, int processors) {
  const int planners = num_planners(call, processors);
  if (processor < planners) {
    const int experts = call.args.num_experts;
    std::vector<u32> words(std::size_t(experts) * 4 + Group::size);
    const PlannerScratch scratch{&words[0], &words[experts], &words[experts * 2], &words[experts * 3], &words[experts * 4]};
    if (!plan_routes(group, call, processor, planners, scratch)) return;
  }
  if (!dispatch(group, call, planners)) return;
  TileScratch scratch;
  while (true) {
    const Task task = wait_ready(call, claim(call));
    if (task.kind == TaskKind::closed) break;
    if (task.kind == TaskKind::gemm1) gemm1_tile(call, task, scratch);
    if (task.kind == TaskKind::gemm2 && !gemm2_tile(call, task, scratch)) return;
  }
  if (!aborted(call)) combine(group, call);
}

// Thread 0 schedules, thread 1 subscribes, the others process.
extern "C" void ${name}(
    const void* packed, u32 thread, u32 threads, const HostRuntime* lent) {
  runtime = lent;
  const MoEArgs& args = *static_cast<const MoEArgs*>(packed);
  const Role role = thread == 0 ? Role::scheduler : thread == 1 ? Role::subscriber : Role::processor;
  const Call call = begin_call(args, thread, threads, role);
  Group group;
  if (role == Role::scheduler) {
    std::vector<u32> words(std::size_t(args.local_experts) * 3 + 1);
    const SchedulerScratch scratch{&words[0], &words[args.local_experts], &words[args.local_experts * 2]};
    schedule(group, call, scratch);
  } else if (role == Role::subscriber) {
    u32 arrived[kMaxWorldSize];
    subscribe(group, call, arrived);
  } else {
    process(group, call, int(thread) - 2, int(threads) - 2);
  }
  leave(group, call, thread, threads);
}
