// ---- PTX, barriers of a block and of a cluster --------------------------------------------------------------------------

// Parallel Synchronization and Communication, bar: named barriers; count is in threads. An arrive orders earlier accesses too.
DEVICE void bar_sync(u32 id, u32 count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
DEVICE void bar_arrive(u32 id, u32 count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }
DEVICE bool bar_red_or(u32 id, u32 count, bool predicate) {
  u32 any;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %3, 0;\n\tbar.red.or.pred q, %1, %2, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(any) : "r"(id), "r"(count), "r"(u32(predicate)) : "memory");
  return any != 0;
}

// Parallel Synchronization and Communication, barrier.cluster: all threads of the cluster's blocks.
DEVICE void barrier_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
