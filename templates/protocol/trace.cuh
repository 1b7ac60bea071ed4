// ---- Trace: who did what, from when to when ---------------------------------------------------------------------------
// Compiled to nothing unless the text was generated for it.
constexpr bool kTrace = ${(instrument.trace_events > 0) | cpp};
constexpr u32 kTracks = ${plan.tracks};  // of a party: its warps, each with events of its own

// One event, from construction to destruction. One lane of a track is `mine`; `what` tells pieces of the same work apart.
struct Span {
  const Call& call;
  Work work;
  bool mine;
  u32 what[2];
  u64 start;

  DEVICE Span(const Call& of, Work kind, bool recorded, u32 first = 0, u32 second = 0)
      : call(of), work(kind), mine(recorded), what{first, second} {
    if constexpr (kTrace) start = now_ns();
  }
  DEVICE ~Span() {
    if constexpr (kTrace) {
      if (mine) record(now_ns());
    }
  }
  DEVICE void record(u64 end) const {
    const u32 track = call.party * kTracks + trace_track();
    u32* const count = call.args.trace_counts + track;
    const u32 at = (*count)++;  // beyond the room: counted, not kept
    if (at < u32(call.args.trace_events))
      call.args.trace[u64(track) * call.args.trace_events + at] = TraceEvent{u32(work), {what[0], what[1]}, 0, start, end};
  }
};
