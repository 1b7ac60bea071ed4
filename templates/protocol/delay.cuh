// ---- Delay: a random wait before something is published, so that tests see orders that an idle machine never shows ------
// Compiled to nothing unless the text was generated for it.
constexpr bool kDelays = ${(instrument.delay_ns > 0) | cpp};

DEVICE void delay(const Call& call) {
  if constexpr (kDelays) {
    const u64 start = now_ns();
    u64 random = (start + call.party * 977u + call.args.rank) * 0x9e3779b97f4a7c15u;
    random ^= random >> 32;
    if (random % 4 != 0 || call.args.delay_ns == 0) return;  // often none: equal delays would change no order
    const u64 wait = (random >> 8) % u64(call.args.delay_ns);
    while (now_ns() - start < wait) backoff(0);
  }
}
