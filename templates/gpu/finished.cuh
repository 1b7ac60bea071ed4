// ---- Waiting for GEMM1 in GEMM2's k loop, by a warp; both GPU block programs load rows this way ---------------------------
// What a warp knows of the parts of the M-block's GEMM1 tiles: one poll tells it 32 of them.
struct FinishedTiles {
  const Call& call;
  u32 serial;
  u32 word = 0;
  u32 bits = 0;
  bool aborted = false;

  // After an abort the loads go on with whatever is in memory: no barrier may be left half-arrived. True: more was acquired.
  DEVICE bool wait(u32 part) {
    if (aborted || (word == part / 32 && (bits >> part % 32 & 1) != 0)) return false;
    u32 seen = 0;  // one lane acquires; pairs with publish_tile()
    if (threadIdx.x % 32 == 0 && wait_part(call, serial, part))
      seen = load_acquire<Scope::device>(call.column_bits(serial) + part / 32);
    word = part / 32;
    bits = WarpGroup{}.broadcast(seen, 0);  // and orders the loads of all lanes after it
    aborted = bits == 0;
    return true;
  }
};
