// ---- PTX of sm_90a: one wrapper per instruction, named after it (with the section of the PTX ISA manual) -------------------
// Every address below is a shared-memory address unless it is a pointer.

struct alignas(64) TensorMap {  // a CUtensorMap, encoded by the launcher
  u64 opaque[16];
};

// Parallel Synchronization and Communication, mbarrier. An arrive releases, a successful wait acquires, both for the block.
DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
DEVICE void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE bool mbarrier_try_wait_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}

// The same between the blocks of a cluster: mapa turns an address of this block into that of `block`.
DEVICE u32 mapa(u32 address, u32 block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
DEVICE void mbarrier_arrive_release_cluster(u32 barrier) {  // waits for this thread's stores everywhere: about a microsecond
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void mbarrier_arrive_relaxed_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE bool mbarrier_try_wait_parity_cluster(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
DEVICE void st_shared_cluster_v4(u32 to, uint4 v) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void st_shared_cluster(u32 to, u32 v) { asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }
DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Parallel Synchronization and Communication, barrier.cluster: all threads of the cluster's blocks.
DEVICE void barrier_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Memory Consistency Model, fence.proxy: ordinary accesses of this thread before, wgmma's and TMA's after.
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Data Movement and Conversion, cp.async.bulk.tensor: the box of the map at (k, row, matrix); what lies outside is zero.
DEVICE void cp_async_bulk_tensor_3d(u32 to, const TensorMap* map, u32 barrier, int k, int row, int matrix, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "r"(matrix), "l"(policy) : "memory");
}
// The same into every block of the cluster whose bit is set in `blocks`, at the same address, completing on its own barrier.
DEVICE void cp_async_bulk_tensor_3d_multicast(
    u32 to, const TensorMap* map, u32 barrier, int k, int row, int matrix, unsigned short blocks, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6, %7;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "r"(matrix), "h"(blocks), "l"(policy) : "memory");
}
// prefetch{u}: the map itself, before its first use.
DEVICE void prefetch_tensormap(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// createpolicy: when such lines leave L2, compared with others.
DEVICE u64 createpolicy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
DEVICE u64 createpolicy_evict_normal() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  return policy;
}

// Miscellaneous, setmaxnreg: by all warps of a warpgroup, which are in step before the next one.
template <int kRegisters>
DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory"); }
template <int kRegisters>
DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory"); }

// Asynchronous Warpgroup Level Matrix, wgmma.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DEVICE void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// d += a . b: 64 rows of a, twice as many rows of b as d has registers, 16 elements of k, both operands in shared memory with k
// contiguous.
//% set type = "bf16" if spec.dtype == "bfloat16" else "f16"
//% for columns in [tile.block_n, tile.block_n // tile.cluster] | unique
//% set registers = columns // 2
DEVICE void wgmma_m64k16(float (&d)[${registers}], u64 a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n${columns}k16.f32.${type}.${type} {"
//% for i in range(0, registers, 8)
      "%${i}, %${i + 1}, %${i + 2}, %${i + 3}, %${i + 4}, %${i + 5}, %${i + 6}, %${i + 7}${"" if i + 8 == registers else ", "}"
//% endfor
      "}, %${registers}, %${registers + 1}, 1, 1, 1, 0, 0;"
      :
//% for i in range(0, registers, 4)
        "+f"(d[${i}]), "+f"(d[${i + 1}]), "+f"(d[${i + 2}]), "+f"(d[${i + 3}])${"" if i + 4 == registers else ","}
//% endfor
      : "l"(a), "l"(b));
}
//% endfor
