// ---- int64 expert ids, as torch.topk gives them, as the int32 that the layer reads -------------------------------------
// What does not fit must not wrap around to an expert: below 0 is masked, from `experts` on is no expert.
extern "C" __global__ void flashmoe_narrow_ids(const long long* wide, int* narrow, long long count, int experts) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const long long id = wide[i];
    narrow[i] = id < 0 ? -1 : id < experts ? int(id) : experts;
  }
}
