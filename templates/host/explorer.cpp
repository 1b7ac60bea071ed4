// Runs several ranks of host kernels as fibers of ONE thread and lets a seed decide every switch, so that a run is
// reproducible and a hang comes back with its seed. Stores to heaps become visible late: a fiber's puts wait for a release of
// its own, and those to peers for a release of system scope by its rank (or for chance, which publishes some of them
// early). A missing release, or one of too narrow a scope, therefore shows.
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <vector>

//% for struct in structs
${struct.cpp}

//% endfor
struct Put {
  void* to;
  std::vector<char> bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  u32 rank, thread;
  u64 wake = 0;       // not before this step
  u64 priority = 0;
  bool finished = false;
  std::vector<Put> puts;
};

enum class Policy { uniform, priority, slow_rank };

struct Explorer {
  std::vector<Fiber> fibers;
  std::vector<std::vector<Put>> outbox;  // per rank: puts to peers, released to the rank but not yet to the system
  std::vector<u64> rank_done;  // fibers of a rank that finished their call, over all calls
  const Launch* launches;
  const Heap* heaps;
  u32 calls, threads;
  ucontext_t home;
  u32 current = 0;
  u64 step = 0, random;
  Policy policy;
  u32 slow_rank;
  const void* lost;
};

static Explorer* explorer = nullptr;
constexpr std::size_t kStackBytes = 256 * 1024;

static u64 next_random() {  // splitmix64
  u64 z = explorer->random += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
static bool chance(u64 one_in) { return next_random() % one_in == 0; }

static void publish(std::vector<Put>& puts, std::size_t count) {  // the oldest ones: stores to one word keep their order
  for (std::size_t i = 0; i < count; ++i) std::memcpy(puts[i].to, puts[i].bytes.data(), puts[i].bytes.size());
  puts.erase(puts.begin(), puts.begin() + std::ptrdiff_t(count));
}

static bool is_remote(u32 rank, const void* to) {
  for (u32 peer = 0; peer < explorer->outbox.size(); ++peer) {
    const Heap& heap = explorer->heaps[peer];
    if (to >= heap.base && to < heap.base + heap.bytes) return peer != rank;
  }
  return false;
}

static u32 pick() {
  Explorer& e = *explorer;
  while (true) {
    u32 best = u32(e.fibers.size()), runnable = 0;
    u64 soonest = ~0ull;
    for (u32 i = 0; i < e.fibers.size(); ++i) {
      const Fiber& fiber = e.fibers[i];
      if (fiber.finished) continue;
      if (fiber.wake > e.step) {
        soonest = fiber.wake < soonest ? fiber.wake : soonest;
        continue;
      }
      ++runnable;
      const bool better = e.policy == Policy::priority ? best == e.fibers.size() || fiber.priority > e.fibers[best].priority
                                                       : next_random() % runnable == 0;
      if (better) best = i;
    }
    if (best < e.fibers.size()) return best;
    if (soonest == ~0ull) return best;  // all finished
    e.step = soonest;
  }
}

static void switch_fiber() {
  Explorer& e = *explorer;
  const u32 from = e.current, to = pick();
  if (to == from) return;
  e.current = to;
  swapcontext(&e.fibers[from].context, to < e.fibers.size() ? &e.fibers[to].context : &e.home);
}

static void delay() {
  Explorer& e = *explorer;
  Fiber& fiber = e.fibers[e.current];
  if (chance(64)) fiber.wake = e.step + next_random() % 400;
  if (e.policy == Policy::slow_rank && fiber.rank == e.slow_rank && chance(16)) fiber.wake = e.step + next_random() % 1500;
  if (chance(700)) {
    const u64 until = e.step + next_random() % 2500;
    for (Fiber& other : e.fibers)
      if (other.rank == fiber.rank && !other.finished) other.wake = until;
  }
}

static void on_point() {
  Explorer& e = *explorer;
  ++e.step;
  Fiber& fiber = e.fibers[e.current];
  std::vector<Put>& outbox = e.outbox[fiber.rank];
  if (!outbox.empty() && chance(16)) publish(outbox, 1 + next_random() % outbox.size());
  delay();
  if (e.policy == Policy::priority && chance(40)) fiber.priority = next_random();
  if (fiber.wake > e.step || chance(3)) switch_fiber();
}

static void on_yield() {  // a failed poll: somebody else must run
  Explorer& e = *explorer;
  ++e.step;
  delay();
  if (e.policy == Policy::priority) e.fibers[e.current].priority = next_random() >> 32;
  switch_fiber();
}

static u64 simulated_ns() { return explorer->step * 1000; }
static void on_put(void* to, const void* from, u64 bytes) {
  const char* data = static_cast<const char*>(from);
  explorer->fibers[explorer->current].puts.push_back({to, std::vector<char>(data, data + bytes)});
  if (chance(8)) on_point();  // between two segments, and between them and their signal
}
static void on_flush(bool system) {
  Fiber& fiber = explorer->fibers[explorer->current];
  std::vector<Put>& outbox = explorer->outbox[fiber.rank];
  for (Put& put : fiber.puts) {
    if (is_remote(fiber.rank, put.to)) outbox.push_back(std::move(put));
    else std::memcpy(put.to, put.bytes.data(), put.bytes.size());
  }
  fiber.puts.clear();
  if (system) publish(outbox, outbox.size());
}
static bool is_lost(const void* word) { return word == explorer->lost; }

static void fiber_main() {
  static const HostRuntime runtime{on_yield, simulated_ns, on_point, on_put, on_flush, is_lost};
  Explorer& e = *explorer;
  Fiber& fiber = e.fibers[e.current];
  for (u32 call = 0; call < e.calls; ++call) {
    const Launch& launch = e.launches[fiber.rank * e.calls + call];
    launch.kernel(launch.args, fiber.thread, e.threads, &runtime);
    on_flush(true);  // the end of a kernel publishes everything
    ++e.rank_done[fiber.rank];
    while (e.rank_done[fiber.rank] < u64(call + 1) * e.threads) on_yield();  // calls of one rank follow each other
  }
  fiber.finished = true;
  switch_fiber();
}

// launches[rank * calls + call], heaps[rank]. Returns the protocol steps taken. One exploration at a time per process.
extern "C" u64 flashmoe_explore(const Launch* launches, const Heap* heaps, u32 ranks, u32 calls, u32 threads, u64 seed,
                               const void* lost) {
  Explorer e{};
  explorer = &e;
  e.fibers = std::vector<Fiber>(std::size_t(ranks) * threads);
  e.rank_done.assign(ranks, 0);
  e.launches = launches;
  e.heaps = heaps;
  e.outbox.resize(ranks);
  e.calls = calls;
  e.threads = threads;
  e.random = seed * 0x2545f4914f6cdd1dull + 1;
  e.policy = Policy(seed % 3);
  e.slow_rank = u32(next_random() % ranks);
  e.lost = lost;
  for (u32 i = 0; i < e.fibers.size(); ++i) {
    Fiber& fiber = e.fibers[i];
    fiber.rank = i / threads;
    fiber.thread = i % threads;
    fiber.priority = next_random();
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, fiber_main, 0);
  }
  e.current = pick();
  swapcontext(&e.home, &e.fibers[e.current].context);
  explorer = nullptr;
  return e.step;
}
