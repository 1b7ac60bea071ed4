// ---- The GPU: types, memory order, groups of threads, math ------------------------------------------------------------
enum class Scope { device, system };

// Every pointer below is to global memory.
template <Scope kScope, class T>
DEVICE T load_acquire(const T* word) {
  if constexpr (kScope == Scope::system) return ld_acquire_sys(word);
  else return ld_acquire_gpu(word);
}
template <Scope kScope, class T>
DEVICE void store_release(T* word, T value) {
  if constexpr (kScope == Scope::system) st_release_sys(word, value);
  else st_release_gpu(word, value);
}
// Releases many words at once: store() publishes what this thread did, or acquired, before the constructor.
struct Release {
  DEVICE Release() { fence_acq_rel_sys(); }
  template <class T>
  DEVICE void store(T* word, T value) const { st_relaxed_sys(word, value); }
};
// System scope costs nothing here, and a word may have a writer on another GPU.
template <class T>
DEVICE T load_relaxed(const T* word) { return ld_relaxed_sys(word); }
template <class T>
DEVICE void store_relaxed(T* word, T value) { st_relaxed_sys(word, value); }
template <class T>
DEVICE T fetch_add_relaxed(T* word, T value) { return atom_add_relaxed_gpu(word, value); }
template <class T>
DEVICE T fetch_add_acq_rel(T* word, T value) { return atom_add_acq_rel_gpu(word, value); }
DEVICE void fetch_or_release(u32* word, u32 bits) { red_or_release_gpu(word, bits); }
DEVICE u32 exchange_relaxed(u32* word, u32 value) { return atom_exch_relaxed_gpu(word, value); }

// Stores to a peer's heap. Only a later store_release by this thread, or by one that it released to, publishes them.
template <int kBytes>
struct Word;
template <>
struct Word<4> { using Type = u32; };
template <>
struct Word<8> { using Type = u64; };
template <>
struct Word<16> { using Type = uint4; };

template <class T>
DEVICE void remote_store(T* to, const T& value) {  // one access, so `to` is aligned to sizeof(T)
  using Bits = typename Word<sizeof(T)>::Type;
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  *reinterpret_cast<Bits*>(to) = bits;
}
DEVICE void remote_store(u64* word, u64 value) { st_relaxed_sys(word, value); }  // a self-contained word: polled

template <class Group, class T>
DEVICE void remote_copy(Group& group, T* to, const T* from, int count) {
  constexpr int kInFlight = 8;  // loads before the first store
  const int vectors = count * int(sizeof(T)) / 16;
  const uint4* const source = reinterpret_cast<const uint4*>(from);
  uint4* const target = reinterpret_cast<uint4*>(to);
  for (int first = group.lane; first < vectors; first += kInFlight * group.size) {
    uint4 vector[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * group.size < vectors) vector[i] = source[first + i * group.size];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * group.size < vectors) target[first + i * group.size] = vector[i];
  }
}

DEVICE void backoff(u32 polls) {
  if (polls >= 64) nanosleep(100);
}
DEVICE u64 now_ns() { return globaltimer(); }
DEVICE constexpr bool stopped() { return false; }  // who ends a call on a GPU early writes into its control page
DEVICE u32 trace_track() { return threadIdx.x / 32; }
// Another one for every launch that runs at the same time.
template <class Args>
DEVICE u32 launch_tag(const Args&) { return (u32(mov_gridid()) * 0x9e3779b1u >> 13) | 1; }
DEVICE int lowest_bit(u64 bits) { return __ffsll((long long)(bits)) - 1; }

// What a lane acquired or stored before sync(), broadcast() or any() is ordered before what any lane does after it.
struct WarpGroup {
  static constexpr int size = 32;
  static constexpr u32 kAll = 0xffffffffu;
  int lane = int(threadIdx.x % 32);

  DEVICE void sync() const { __syncwarp(); }
  template <class T>
  DEVICE T broadcast(T value, int from) const {
    const T result = T(__shfl_sync(kAll, value, from));
    __syncwarp();  // a shuffle alone does not order memory
    return result;
  }
  DEVICE bool broadcast(bool value, int from) const { return broadcast(u32(value), from) != 0; }
  DEVICE bool any(bool predicate) const {
    const bool result = __any_sync(kAll, predicate) != 0;
    __syncwarp();
    return result;
  }
  DEVICE u32 votes(bool predicate) const {  // a bit per lane
    const u32 result = __ballot_sync(kAll, predicate);
    __syncwarp();
    return result;
  }
  DEVICE u32 either(u32 bits) const { return __reduce_or_sync(kAll, bits); }  // of all lanes
  DEVICE u32 leading(bool predicate) const {  // lanes before the first false
    return u32(__clz(int(__brev(~__ballot_sync(kAll, predicate)))));
  }
  DEVICE u32 exclusive_count(bool predicate, u32* total) const {  // true lanes before mine
    const u32 votes = __ballot_sync(kAll, predicate);
    *total = u32(__popc(votes));
    return u32(__popc(votes & ((1u << lane) - 1)));
  }
  DEVICE u32 sum(u32 value) const { return __reduce_add_sync(kAll, value); }
  DEVICE u32 exclusive_sum(u32 value, u32* total) const {  // of the lanes before mine
    u32 upto = value;
#pragma unroll
    for (int distance = 1; distance < size; distance *= 2) {
      const u32 other = __shfl_up_sync(kAll, upto, distance);
      if (lane >= distance) upto += other;
    }
    *total = __shfl_sync(kAll, upto, size - 1);
    return upto - value;
  }
};

// All threads of the block. `sums` is shared memory of its own, a word per warp.
struct BlockGroup {
  static constexpr int kWarpLanes = 32;
  u32* sums;
  int lane = int(threadIdx.x);
  int size = int(blockDim.x);
  int warps = int(blockDim.x) / kWarpLanes;
  WarpGroup warp;

  DEVICE int warp_index() const { return lane / kWarpLanes; }
  DEVICE void sync() const { __syncthreads(); }
  DEVICE bool any(bool predicate) const { return __syncthreads_or(predicate) != 0; }
  DEVICE void add(u32* shared_word, u32 value) const { atomicAdd(shared_word, value); }
  DEVICE void add_all(u32* shared_word, u32 value) const {  // one addition per warp
    const u32 sum = warp.sum(value);
    if (warp.lane == 0 && sum != 0) atomicAdd(shared_word, sum);
  }
  DEVICE u32 exclusive_sum(u32 value, u32* total) const {
    u32 of_warp = 0, before = 0;
    const u32 mine = warp.exclusive_sum(value, &of_warp);
    if (warp.lane == 0) sums[warp_index()] = of_warp;
    __syncthreads();
    *total = 0;
    for (int other = 0; other < warps; ++other) {
      if (other == warp_index()) before = *total;
      *total += sums[other];
    }
    __syncthreads();  // the next sum may overwrite them
    return before + mine;
  }
  // By one warp: each lane takes the next number of its counter, lane by lane.
  DEVICE u32 take_numbers(u32* counters, u32 which, bool valid) const {
    const u32 same = __match_any_sync(WarpGroup::kAll, which);
    const u32 earlier = u32(__popc(same & ((1u << warp.lane) - 1)));
    const u32 first = valid ? counters[which] : 0;
    __syncwarp();
    if (valid && earlier == 0) counters[which] = first + u32(__popc(same));
    return first + earlier;
  }
};

using Acc = ${spec.element.accumulator};
//% if spec.element.size == 2
// 16-bit results round away the 2 ulp of these.
DEVICE Acc exp_of(Acc z) { return __expf(z); }
DEVICE Acc divide_of(Acc a, Acc b) { return __fdividef(a, b); }
//% else
DEVICE Acc exp_of(Acc z) { return exp(z); }
DEVICE Acc divide_of(Acc a, Acc b) { return a / b; }
//% endif
DEVICE Acc fma_of(Acc a, Acc b, Acc c) { return fma(a, b, c); }

// The normal distribution function: its relative error is small in the lower tail too, where 1 + erf(z / sqrt(2)) cancels.
//% if spec.dtype == "float64"
DEVICE Acc normal_cdf(Acc z) { return 0.5 * erfc(z * -0.70710678118654752440); }
//% else
DEVICE Acc polynomial(Acc, Acc factor) { return factor; }
template <class... Factors>
DEVICE Acc polynomial(Acc x, Acc factor, Factors... of_higher_powers) {
  return fma_of(polynomial(x, of_higher_powers...), x, factor);
}

// That of -a. Without a branch: erfc() would take too many registers beside the sums.
//%   if spec.element.size == 2
// Within 5e-5: its logarithm to base 2 is smooth. From 13 on nothing is left of it.
DEVICE Acc lower_tail(Acc a) {
  return ex2_approx_ftz(polynomial(fminf(a, 13.0f), -1.00002575f, -1.15105104f, -0.458636284f, -0.0540888831f, 8.72331113e-3f,
                                   -1.03439728e-3f, 8.553003e-5f, -4.61732225e-6f, 1.45287544e-7f, -2.01239159e-9f));
}
//%   else
// Within 6e-7: exp(-a^2 / 2) times a polynomial of 1 / (1 + 0.3 a). From 16 on nothing is left of it.
DEVICE Acc lower_tail(Acc a) {
  a = fminf(a, 16.0f);
  const Acc s = divide_of(1.0f, 1.0f + 0.3f * a), square = a * a;
  const Acc scaled = polynomial(s, 0.119632006f, 0.120712131f, 0.100175977f, 0.127691671f, -0.0520338044f, 0.20455654f,
                                -0.156158298f, 0.0354236998f);
  const Acc tail = scaled * (s * exp_of(-0.5f * square));
  return tail - tail * 0.5f * fma_of(a, a, -square);  // what rounding took from a^2
}
//%   endif
DEVICE Acc normal_cdf(Acc z) {
  const Acc tail = lower_tail(fabsf(z));
  return z < 0.0f ? tail : 1.0f - tail;
}
//% endif
