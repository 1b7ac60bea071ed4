// Runs a host kernel: one thread per role, as many as the caller asks for. Compiled once into a library of its own.
#include <atomic>
#include <chrono>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

static u64 steady_ns() {
  return u64(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

// Fault injection for tests: the word at this address is never written. One process-wide word is enough.
static const void* lost_word = nullptr;
static bool is_lost(const void* word) { return word == lost_word; }

extern "C" void flashmoe_lose_word(const void* word) { lost_word = word; }

// 0, or -1 when the machine has no threads left. Threads that did start have nothing to wait for then but each other, so
// none is started until all exist: they wait at a gate.
extern "C" int flashmoe_run(Kernel kernel, const void* args, u32 threads) {
  static const HostRuntime plain{std::this_thread::yield, steady_ns, nullptr, nullptr, nullptr, nullptr};
  static const HostRuntime lossy{std::this_thread::yield, steady_ns, nullptr, nullptr, nullptr, is_lost};
  const HostRuntime* runtime = lost_word == nullptr ? &plain : &lossy;
  enum class Gate : int { closed, open, cancelled };
  std::atomic<Gate> gate{Gate::closed};
  std::vector<std::thread> started;
  try {
    started.reserve(threads - 1);
    for (u32 thread = 1; thread < threads; ++thread) {
      started.emplace_back([=, &gate] {
        gate.wait(Gate::closed);
        if (gate.load() == Gate::open) kernel(args, thread, threads, runtime);
      });
    }
  } catch (const std::system_error&) {
    gate = Gate::cancelled;
  } catch (const std::bad_alloc&) {
    gate = Gate::cancelled;
  }
  const bool complete = gate.load() == Gate::closed;
  if (complete) gate = Gate::open;
  gate.notify_all();
  if (complete) kernel(args, 0, threads, runtime);
  for (std::thread& thread : started) thread.join();
  return complete ? 0 : -1;
}
