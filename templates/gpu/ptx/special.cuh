// ---- PTX, special registers and the rest --------------------------------------------------------------------------------

// Special Registers.
DEVICE u64 globaltimer() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}
DEVICE u64 mov_gridid() {  // tells concurrent launches apart
  u64 launch;
  asm("mov.u64 %0, %%gridid;" : "=l"(launch));
  return launch;
}
DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Special Registers: each time from the register, where the compiler would keep what it has read.
DEVICE u32 mov_tid_x() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
DEVICE u32 mov_nctaid_x() {
  u32 blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

// Miscellaneous, nanosleep.
DEVICE void nanosleep(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

// Miscellaneous, setmaxnreg: by all warps of a warpgroup, which are in step before the next one.
template <int kRegisters>
DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory"); }
template <int kRegisters>
DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory"); }
