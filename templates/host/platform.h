// ---- The host: C++ types, atomics and a group of one ---------------------------------------------------------------
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#define DEVICE inline

static thread_local const HostRuntime* runtime = nullptr;  // set when a thread enters the kernel

enum class Scope { device, system };

DEVICE void protocol_point() {
  if (runtime->point != nullptr) runtime->point();
}
DEVICE void before_release(Scope scope) {
  if (runtime->flush != nullptr) runtime->flush(scope == Scope::system);
  protocol_point();
}

template <Scope, class T>
DEVICE T load_acquire(const T* word) {
  protocol_point();
  return std::atomic_ref<T>(*const_cast<T*>(word)).load(std::memory_order_acquire);
}
template <Scope scope, class T>
DEVICE void store_release(T* word, T value) {
  before_release(scope);
  if (runtime->lost != nullptr && runtime->lost(word)) return;
  std::atomic_ref<T>(*word).store(value, std::memory_order_release);
}
struct Release {  // many words at once; see the GPU's
  template <class T>
  void store(T* word, T value) const { store_release<Scope::system>(word, value); }
};
template <class T>
DEVICE T load_relaxed(const T* word) {
  return std::atomic_ref<T>(*const_cast<T*>(word)).load(std::memory_order_relaxed);
}
template <class T>
DEVICE void store_relaxed(T* word, T value) {
  std::atomic_ref<T>(*word).store(value, std::memory_order_relaxed);
}
template <class T>
DEVICE T fetch_add_relaxed(T* word, T value) {
  protocol_point();
  return std::atomic_ref<T>(*word).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
DEVICE T fetch_add_acq_rel(T* word, T value) {
  before_release(Scope::device);
  return std::atomic_ref<T>(*word).fetch_add(value, std::memory_order_acq_rel);
}
DEVICE void fetch_or_release(u32* word, u32 bits) {
  before_release(Scope::device);
  std::atomic_ref<u32>(*word).fetch_or(bits, std::memory_order_release);
}
DEVICE u32 exchange_relaxed(u32* word, u32 value) {
  return std::atomic_ref<u32>(*word).exchange(value, std::memory_order_relaxed);
}

// Stores to a peer's heap. Only a later store_release by this thread, or by one that it released to, publishes them.
template <class T>
DEVICE void remote_store(T* to, const T& value) {
  if (runtime->put != nullptr) runtime->put(to, &value, sizeof(T));
  else *to = value;
}
DEVICE void remote_store(u64* word, u64 value) {  // a self-contained word: polled, so it must not tear
  if (runtime->put != nullptr) runtime->put(word, &value, sizeof value);
  else store_relaxed(word, value);
}
template <class Group, class T>
DEVICE void remote_copy(Group&, T* to, const T* from, int count) {
  if (runtime->put != nullptr) runtime->put(to, from, sizeof(T) * u64(count));
  else std::memcpy(to, from, sizeof(T) * u64(count));
}

DEVICE void backoff(u32) { runtime->yield(); }
DEVICE bool stopped() { return runtime->stop != nullptr && load_relaxed(runtime->stop) != 0; }
DEVICE u64 now_ns() { return runtime->now_ns(); }
DEVICE u32 trace_track() { return 0; }
// Another one for every launch that runs at the same time.
template <class Args>
DEVICE u32 launch_tag(const Args& args) { return (u32(reinterpret_cast<u64>(&args) >> 4) * 0x9e3779b1u >> 13) | 1; }
DEVICE int lowest_bit(u64 bits) { return __builtin_ctzll(bits); }

struct Group {
  static constexpr int lane = 0;
  static constexpr int size = 1;
  void sync() const {}
  template <class T>
  T broadcast(T value, int) const { return value; }
  bool any(bool predicate) const { return predicate; }
  u32 votes(bool predicate) const { return predicate; }                                  // a bit per lane
  u32 either(u32 bits) const { return bits; }                                            // of all lanes
  u32 leading(bool predicate) const { return predicate; }                                // lanes before the first false
  u32 exclusive_count(bool predicate, u32* total) const { *total = predicate; return 0; }  // true lanes before mine
  void add(u32* word, u32 value) const { *word += value; }
  void add_all(u32* word, u32 value) const { *word += value; }  // of every lane, one addition where it can be
  u32 sum(u32 value) const { return value; }
  u32 exclusive_sum(u32 value, u32* total) const { *total = value; return 0; }  // of the lanes before mine
  static constexpr int kWarpLanes = 1;  // lanes that run in step
  static constexpr int warps = 1;
  int warp_index() const { return 0; }
  // Each lane takes the next number of its counter, lane by lane: a counter's numbers go up with the lanes.
  u32 take_numbers(u32* counters, u32 which, bool valid) const { return valid ? counters[which]++ : 0; }
};

using Acc = ${spec.element.accumulator};
DEVICE Acc exp_of(Acc z) { return std::exp(z); }
DEVICE Acc divide_of(Acc a, Acc b) { return a / b; }
DEVICE Acc fma_of(Acc a, Acc b, Acc c) { return std::fma(a, b, c); }
DEVICE Acc normal_cdf(Acc z) { return Acc(0.5) * std::erfc(z * Acc(-0.70710678118654752440)); }  // no cancellation
