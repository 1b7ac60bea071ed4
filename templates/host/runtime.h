// ---- What the launcher lends a host kernel ---------------------------------------------------------------------------
#include <cstdint>

using u32 = std::uint32_t;
using u64 = std::uint64_t;

struct HostRuntime {  // the explorer fills every function; in a plain launch all but the first two are null
  void (*yield)();                              // let others run; called by every failed poll
  u64 (*now_ns)();
  void (*point)();                              // a protocol step: the explorer may switch or delay here
  void (*put)(void* to, const void* from, u64 bytes);  // a store to a peer that may become visible late
  void (*flush)(bool system);                   // a release: this thread's puts become visible, to peers if `system`
  bool (*lost)(const void* word);               // fault injection: this signal is never delivered
  const u32* stop;                              // not 0: nobody wants the result any more; may be null
};

using Kernel = void (*)(const void* args, u32 thread, u32 threads, const HostRuntime* runtime);
