// Runs a host kernel: one thread per role, as many as the caller asks for. Compiled once into a library of its own.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
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

// One launch. It is made before it starts, so that whoever is interrupted between the two has something to wait for.
class Run {
 public:
  // -1 when the machine has no threads left. Threads that did start have nothing to wait for then but each other, so none
  // is let in until all exist: they wait at a gate.
  int start(Kernel kernel, const void* args, u32 threads, const u32* stop) {
    runtime_ = HostRuntime{std::this_thread::yield, steady_ns, nullptr, nullptr, nullptr, lost_word ? is_lost : nullptr, stop};
    try {
      threads_.reserve(threads);
      for (u32 thread = 0; thread < threads; ++thread) {
        threads_.emplace_back([=, this] {
          gate_.wait(Gate::closed);
          if (gate_.load() == Gate::open) kernel(args, thread, threads, &runtime_);
          const std::lock_guard lock(mutex_);
          if (++left_ == threads_.size()) all_left_.notify_all();
        });
      }
    } catch (const std::system_error&) {
      gate_ = Gate::cancelled;
    } catch (const std::bad_alloc&) {
      gate_ = Gate::cancelled;
    }
    const bool complete = gate_.load() == Gate::closed;
    if (complete) gate_ = Gate::open;
    gate_.notify_all();
    return complete ? 0 : -1;
  }
  // Whether all threads have left, after waiting that long for them.
  bool wait(u32 milliseconds) {
    std::unique_lock lock(mutex_);
    return all_left_.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return left_ == threads_.size(); });
  }
  ~Run() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  enum class Gate : int { closed, open, cancelled };
  HostRuntime runtime_{};
  std::atomic<Gate> gate_{Gate::closed};
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable all_left_;
  std::size_t left_ = 0;
};

extern "C" Run* flashmoe_new_run() { return new (std::nothrow) Run; }
extern "C" int flashmoe_start(Run* run, Kernel kernel, const void* args, u32 threads, const u32* stop) {
  return run->start(kernel, args, threads, stop);
}
extern "C" int flashmoe_wait(Run* run, u32 milliseconds) { return run->wait(milliseconds); }
extern "C" void flashmoe_end_run(Run* run) { delete run; }  // waits for its threads
