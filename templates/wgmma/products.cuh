// ---- The products, by the consumer warpgroups --------------------------------------------------------------------------
// The sums of a thread, of the 64 rows of its warpgroup. Warp w has rows 16 w to 16 w + 15; value[4 n + 2 half + i] is row
// lane / 4 + 8 half, column 8 n + 2 (lane % 4) + i.
template <bool kSplit>
struct Sums {
  static constexpr int kColumns = OperandB::kRows / Shape<kSplit>::kParts;
  float value[kColumns / 2];
};

// Matrix Descriptor: 128-byte swizzle, 1024 bytes from 8 rows to the next 8. The leading offset is not used: k fits a line.
DEVICE u64 descriptor(u32 tile) { return u64(1) << 62 | u64(1024 >> 4) << 32 | u64(1) << 16 | tile >> 4; }

DEVICE u32 consumer() { return threadIdx.x / 128 - 1; }  // warpgroup 0 loads

// In every block of the cluster. Nothing is to be published: the products that read the stage have been waited for.
DEVICE void release_stage(const Pipeline& pipeline, const StageTurn& turn) {
  const u32 block = threadIdx.x % 32;
  if (block < kCluster) mbarrier_arrive_relaxed_cluster(mapa(pipeline.empty(turn), block));
}

// A warpgroup without rows keeps the barriers in step.
template <bool kSplit, int kDepth>
DEVICE void pass_tile(const Pipeline& pipeline, StageTurn& turn) {
#pragma unroll 1
  for (int step = 0; step < Shape<kSplit>::template kSteps<kDepth>; ++step) {
    pipeline.wait_full(turn);
    __syncwarp();
    release_stage(pipeline, turn);
    turn.advance();
  }
}

// sums = A . B over kDepth elements, k ascending. One step's products run while the next stage is waited for.
template <bool kSplit, int kDepth>
DEVICE void multiply_tile(Sums<kSplit>& sums, const Pipeline& pipeline, StageTurn& turn) {
  using Tile = Shape<kSplit>;
  const u32 mine = consumer() * 64 * kRowBytes;  // of A
  StageTurn before = turn;
#pragma unroll
  for (float& value : sums.value) value = 0.0f;  // from a first product that ignores its sums ptxas makes a second copy of them
#pragma unroll 1
  for (int step = 0; step < Tile::template kSteps<kDepth>; ++step) {
    pipeline.wait_full(turn);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Tile::kStageSteps; ++i) {
      const u32 a = pipeline.tile<OperandA>(turn) + mine + i * Tile::template kStepBytes<OperandA>;
      const u32 b = pipeline.tile<OperandB>(turn) + i * Tile::template kStepBytes<OperandB>;
#pragma unroll
      for (int k = 0; k < kRowBytes; k += 32)  // 16 elements of k; the swizzle goes by the address, so a step is just added
        wgmma_m64k16(sums.value, descriptor(a + k), descriptor(b + k));
    }
    wgmma_commit_group();
    wgmma_wait_group<1>();  // the step before has read its stage
    if (step > 0) release_stage(pipeline, before);
    before = turn;
    turn.advance();
  }
  wgmma_wait_group<0>();
  release_stage(pipeline, before);
#pragma unroll
  for (float& value : sums.value) asm volatile("" : "+f"(value)::"memory");  // not to be read before the wait above
}
