// ---- Processors: claim a ticket, wait until its task exists, run it, publish the result -------------------------------
// By one lane. Without rows when the ticket stands for nothing.
DEVICE Task wait_task(const Call& call, u32 ticket) {
  Position at{};
  const bool waited = wait_until(
      call, Await::task, ticket, u64(ticket), [&] { return load_acquire<Scope::device>(&call.counters().queue); },
      [&](u64 queue) { return (at = decode(ticket, queue)).found != Found::waiting; });
  if (!waited || at.found != Found::task) return Task{TaskKind::closed, 0, 0, false, Share::rows, 0, {}};
  return task_at(at, call.args.entries[kNumPhases * u64(at.entry) + u32(at.kind)]);
}

// By one lane: a ticket for the next task, and the wait until that exists.
DEVICE Task claim_task(const Call& call) {
  Task task;
  do {
    task = wait_task(call, fetch_add_relaxed(&call.counters().task_ticket, 1u));
  } while (task.block.rows == 0 && task.kind != TaskKind::closed);
  if (aborted(call)) task.kind = TaskKind::closed;
  return task;
}

// A tile of the first phase is in the ring: set its bits. Pairs with wait_part().
DEVICE void publish_tile(const Call& call, const Task& task) {
  delay(call);
  const u32 at = task.column * kCluster;
  const u32 bits = task.share == Share::columns ? 1u << task.part : (1u << kCluster) - 1;
  fetch_or_release(call.column_bits(task.serial) + at / 32, bits << at % 32);
}

// A later phase polls only for the part of a tile whose columns it reads next.
DEVICE bool wait_part(const Call& call, u32 serial, u32 part) {
  const u32* word = call.column_bits(serial) + part / 32;
  const u32 bit = 1u << part % 32;
  return wait_until(
      call, Await::gemm1, part, bit, [&] { return u64(load_acquire<Scope::device>(word)); },
      [&](u64 bits) { return (u32(bits) & bit) != 0; });
}

// A tile of the last phase is stored; true for the one that finished the M-block, which then calls return_rows().
DEVICE bool finish_tile(const Call& call, const Task& task) {
  delay(call);
  const u32 parts = task.share == Share::columns ? 1 : kCluster;
  return fetch_add_acq_rel(call.done_parts(task.serial), parts) + parts == kDoneParts;
}
