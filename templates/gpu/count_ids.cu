// ---- How many of a call's routes go to each expert ----------------------------------------------------------------------
// One block, so that the counts need no clearing before it. Ids that are no experts are left out.
extern "C" __global__ void flashmoe_count_ids(const int* ids, int* counts, long long routes, int experts) {
  constexpr int kMaxExperts = 1024;
  __shared__ int sums[kMaxExperts];
  for (int e = int(threadIdx.x); e < kMaxExperts; e += int(blockDim.x)) sums[e] = 0;
  __syncthreads();
  for (long long i = threadIdx.x; i < routes; i += blockDim.x)
    if (unsigned(ids[i]) < unsigned(experts)) atomicAdd(sums + ids[i], 1);
  __syncthreads();
  for (int e = int(threadIdx.x); e < experts; e += int(blockDim.x)) counts[e] = sums[e];
}
