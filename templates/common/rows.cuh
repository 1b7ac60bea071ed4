// ---- Rows in memory: what their elements are and how far they are apart, for each operand on its own -------------------------
using Input = Element;     // x
using Sent = Element;      // a token's row in the heap of the rank that owns an expert
using Weight = Element;    // gate, up and down
using Bias = Element;      // of their columns
using Middle = Element;    // the intermediate
using Returned = Element;  // an expert's row on its way back
using Output = Element;    // y
constexpr int kInputRowBytes = ${plan.rows.input.bytes};
constexpr int kSentRowBytes = ${plan.rows.sent.bytes};
constexpr int kMiddleRowBytes = ${plan.rows.middle.bytes};
constexpr int kReturnedRowBytes = ${plan.rows.returned.bytes};
constexpr int kOutputRowBytes = ${plan.rows.output.bytes};

// The row at `index` behind the first one, when `bytes` are between two.
template <class T>
DEVICE T* row_at(T* first, long long index, long long bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(first) + index * bytes);
}
template <class T>
DEVICE const T* row_at(const T* first, long long index, long long bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + index * bytes);
}
