// Runs the calls of a bundle (see race.py) with real threads, for ThreadSanitizer: usage: race BUNDLE RESULT REPEATS
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "runtime.h"

extern "C" void KERNEL(const void*, u32, u32, const HostRuntime*);
class Run;
extern "C" Run* flashmoe_new_run();
extern "C" int flashmoe_start(Run*, Kernel kernel, const void* args, u32 threads, const u32* stop);
extern "C" void flashmoe_end_run(Run*);

template <class T>
static T take(std::istream& in) {
  T value;
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

int main(int, char** argv) {
  std::ifstream in(argv[1], std::ios::binary);
  std::vector<char*> buffers(take<u32>(in));
  std::vector<u64> sizes;
  for (char*& buffer : buffers) {
    sizes.push_back(take<u64>(in));
    buffer = static_cast<char*>(std::aligned_alloc(256, (sizes.back() + 511) / 256 * 256));
    in.read(buffer, std::streamsize(sizes.back()));
  }
  const u32 ranks = take<u32>(in), calls = take<u32>(in), threads = take<u32>(in), bytes = take<u32>(in);
  std::vector<std::vector<char>> args(std::size_t(ranks) * calls);
  for (std::vector<char>& packed : args) {
    packed.resize(bytes);
    in.read(packed.data(), bytes);
    for (u32 n = take<u32>(in); n > 0; --n) {
      const u32 at = take<u32>(in), buffer = take<u32>(in);
      const char* target = buffers[buffer] + take<u64>(in);
      std::memcpy(&packed[at], &target, sizeof target);
    }
  }
  for (int repeat = std::atoi(argv[3]); repeat > 0; --repeat) {
    std::vector<std::thread> started;
    for (u32 rank = 0; rank < ranks; ++rank)
      started.emplace_back([&, rank] {
        for (u32 call = 0; call < calls; ++call) {
          std::this_thread::sleep_for(std::chrono::microseconds((rank * 7 + call * 13 + repeat * 5) % 11 * 100));
          Run* const run = flashmoe_new_run();
          flashmoe_start(run, KERNEL, args[rank * calls + call].data(), threads, nullptr);
          flashmoe_end_run(run);
        }
      });
    for (std::thread& thread : started) thread.join();
  }
  std::ofstream out(argv[2], std::ios::binary);
  for (std::size_t i = 0; i < buffers.size(); ++i) out.write(buffers[i], std::streamsize(sizes[i]));
  return 0;
}
