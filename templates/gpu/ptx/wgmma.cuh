// ---- PTX, matrices of a warpgroup ---------------------------------------------------------------------------------------

// Asynchronous Warpgroup Level Matrix, wgmma.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DEVICE void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// d += a . b: 64 rows of a, twice as many rows of b as d has registers, 16 elements of k, both operands in shared memory with k
// contiguous.
//% set type = "bf16" if spec.dtype == "bfloat16" else "f16"
//% set widths = [tile.block_n, tile.block_n // tile.cluster] if tile else []
//% for columns in widths | unique
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
