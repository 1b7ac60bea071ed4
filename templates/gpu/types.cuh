// ---- Words of a GPU -----------------------------------------------------------------------------------------------------
using u32 = unsigned int;
using u64 = unsigned long long;
static_assert(sizeof(u32) == 4 && sizeof(u64) == 8);

#define DEVICE __device__ __forceinline__
