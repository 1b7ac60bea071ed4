// ---- Send: segments of a peer's heap, then the signals that they are there -------------------------------------------------
// A segment is memory in a peer's heap that this rank alone writes in a call; its signal is a word there, and who has seen it
// (wait_word) may read the segment. Here stores carry both, over a bus or to the rank itself. Nothing else writes to a peer but
// the tiles of the last phase: they store where output_row() says, and return_rows() signals for them.

// One lane's part of a segment.
template <class T>
DEVICE void send_part(T* to, const T& value) { remote_store(to, value); }

// By a group: a multiple of 16 bytes.
template <class Group>
DEVICE void send_bytes(Group& group, void* to, const void* from, int bytes) {
  remote_copy(group, static_cast<char*>(to), static_cast<const char*>(from), bytes);
}

// A word that is its own signal: {epoch, value}, polled by the peer.
DEVICE void send_word(const Call& call, u64* to, u32 value) { remote_store(to, call.word(value)); }

// By a group. put() sends segments, each lane its part; then word_at(i) is the signal of one of them, for i from 0 to `signals`.
// Null: there is none.
template <class Group, class Put, class WordAt>
DEVICE void send_segments(Group& group, const Call& call, Put put, int signals, WordAt word_at, u32 value = 1) {
  put();
  group.sync();
  delay(call);
  for (int i = group.lane; i < signals; i += group.size)
    if (u64* const word = word_at(i)) store_release<Scope::system>(word, call.word(value));
}

// Signals of segments that other threads have sent, and this one has acquired: many at once.
struct Signals {
  const Call& call;
  Release release{};

  DEVICE void raise(u64* word, u32 value) const { release.store(word, call.word(value)); }
};
