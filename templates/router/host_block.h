// ---- Block program of the router: the threads share the tokens --------------------------------------------------------
struct SelectGroup : Group {
  int argmax(Key, int index) const { return index; }
  Acc sum(Acc value) const { return value; }
};

struct LogitScratch {  // of one thread; the padding of every row stays zero
  std::vector<Acc> rows = std::vector<Acc>(std::size_t(kBlockTokens) * padded(kHidden));
  std::vector<Acc> columns = std::vector<Acc>(2 * std::size_t(padded(kHidden)));
  std::vector<Acc> sums = std::vector<Acc>(std::size_t(kBlockTokens) * 2);
};

// Logits of tokens [first, first + count), two experts at a time. An odd last expert has a stale neighbour whose products
// nobody reads.
DEVICE void make_logits(const RouterArgs& args, int first, int count, LogitScratch& scratch) {
  constexpr int kPadded = padded(kHidden);
  for (int r = 0; r < count; ++r) convert_row(&scratch.rows[r * kPadded], args.x + u64(first + r) * kHidden, 0, kHidden);
  for (int e = 0; e < args.num_experts; e += 2) {
    const int pair = e + 1 < args.num_experts ? 2 : 1;
    for (int c = 0; c < pair; ++c)
      convert_row(&scratch.columns[c * kPadded], args.router_weight + u64(e + c) * kHidden, 0, kHidden);
    pair_products(scratch.rows.data(), count, scratch.columns.data(), kPadded, scratch.sums.data());
    for (int c = 0; c < pair; ++c) {
      const Acc bias = args.logit_bias != nullptr ? Acc(args.logit_bias[e + c]) : Acc(0);
      for (int r = 0; r < count; ++r) args.logits[u64(first + r) * args.num_experts + e + c] = scratch.sums[r * 2 + c] + bias;
    }
  }
}

extern "C" void ${name}(
    const void* packed, u32 thread, u32 threads, const HostRuntime* lent) {
  runtime = lent;
  const RouterArgs& args = *static_cast<const RouterArgs*>(packed);
  const int tokens = token_count(args);
  const int share = (tokens + int(threads) - 1) / int(threads);
  const int begin = int(thread) * share;
  const int end = begin + share < tokens ? begin + share : tokens;
  if (begin >= end) return;
  SelectGroup group;
  LogitScratch scratch;
  for (int first = begin; first < end && !stopped(); first += kBlockTokens) {
    const int count = first + kBlockTokens < end ? kBlockTokens : end - first;
    make_logits(args, first, count, scratch);
    for (int token = first; token < first + count; ++token)
      select_experts(group, args, args.logits + u64(token) * args.num_experts, args.topk_ids + u64(token) * kTopK,
                     args.topk_weights + u64(token) * kTopK);
  }
}
