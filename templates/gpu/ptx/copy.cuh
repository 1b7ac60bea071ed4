// ---- PTX, copies into shared memory; `to` and `barrier` are shared-memory addresses -------------------------------------

// Data Movement and Conversion, cvta: the address by which PTX names a place in shared memory.
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Data Movement and Conversion, cp.async: 16 bytes past L1; with src_bytes = 0 nothing is read and zeros are written.
DEVICE void cp_async_16(u32 to, const void* from, u32 src_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(src_bytes) : "memory");
}
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

struct alignas(64) TensorMap {  // a CUtensorMap, encoded by the launcher
  u64 opaque[16];
};

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

// Data Movement and Conversion, prefetch: the map itself, before its first use.
DEVICE void prefetch_tensormap(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Data Movement and Conversion, createpolicy: when such lines leave L2, compared with others.
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
