// ---- A block as a party: the last block of the grid is the OS, by warps, all others process ------------------------------
// Special registers, read again where they are used: what follows from them would take registers during the products.
DEVICE u32 thread_index() { return mov_tid_x(); }
DEVICE u32 grid_size() { return mov_nctaid_x(); }

struct BlockParty {
  using Lanes = WarpGroup;
  static constexpr int kLanes = kThreads / 32;
  const MoEArgs& args;
  char* work;
  BlockGroup group;

  DEVICE static bool is_system() { return blockIdx.x == gridDim.x - 1; }
  DEVICE static Role role() {
    return !is_system() || threadIdx.x >= 64 ? Role::processor : threadIdx.x < 32 ? Role::scheduler : Role::subscriber;
  }
  DEVICE static int processor() { return int(blockIdx.x); }
  DEVICE static int processors() { return int(grid_size()) - 1; }
  DEVICE static u32 parties() { return grid_size(); }
  DEVICE Call call(Role role) const { return begin_call(args, blockIdx.x, grid_size(), role); }
  template <class T>
  DEVICE T& scratch() const { return *reinterpret_cast<T*>(work); }
};
