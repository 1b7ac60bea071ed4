// ---- Combine: expert rows back to the token's rank, then the weighted sum in route order ------------------------------
struct Sum {
  Acc value[kVector];

  DEVICE void clear() {
    for (int i = 0; i < kVector; ++i) value[i] = Acc(0);
  }
  DEVICE void add(Acc weight, const Element* row) {
    const Vector part = *reinterpret_cast<const Vector*>(row);
    for (int i = 0; i < kVector; ++i) value[i] = fma_of(weight, to_acc(part.element[i]), value[i]);
  }
  DEVICE Vector rounded() const {
    Vector out;
    for (int i = 0; i < kVector; ++i) out.element[i] = from_acc(value[i]);
    return out;
  }
};

// Combine by rank: all of the token's rows on this rank are staged; send their sum, rounded once.
template <class Group>
DEVICE void return_sum(Group& group, const Call& call, int source, int token, int slot) {
  const MoEArgs& args = call.args;
  const int* ordinals = call.ordinals(args.rank, source) + u64(token) * kTopK;
  Element* const out = call.return_row(source, token, slot);
  for (int column = group.lane * kVector; column < kHidden; column += group.size * kVector) {
    Sum sum;
    sum.clear();
    for (int j = 0; j < kTopK; ++j) {
      const int ordinal = ordinals[j];
      if (ordinal < 0) continue;
      const Acc weight = kWeightOnInput ? Acc(1) : Acc(call.list(args.rank, source)[ordinal].weight);
      sum.add(weight, args.staged_rows + (u64(source) * args.staged_stride + ordinal) * kHidden + column);
    }
    remote_store(reinterpret_cast<Vector*>(out + column), sum.rounded());
  }
  group.sync();
  if (group.lane == 0) store_release<Scope::system>(call.return_word(source, token, slot), call.word(1));
}

// The finisher of an M-block: publish its rows [first, last) to their sources. Pairs with wait_returns().
template <class Group>
DEVICE void return_rows(Group& group, const Call& call, const ReadyBlock& block, int first, int last) {
  for (int start = first; start < last; start += group.size) {
    const int i = start + group.lane;
    Row row{};
    if (i < last) row = find_row(call, block.expert_slot, block.first_row + i);
    if (!call.args.combine_by_rank) {
      if (i < last) store_release<Scope::system>(call.return_word(row.source, row.token(), row.slot()), call.word(1));
    } else {
      bool complete = false;
      if (i < last) {
        const int* ordinals = call.ordinals(call.args.rank, row.source) + u64(row.token()) * kTopK;
        u32 routes = 0;
        for (int j = 0; j < kTopK; ++j) routes += ordinals[j] >= 0;
        complete = fetch_add_acq_rel(call.routes_done(row.source, row.token()), 1u) + 1 == routes;
      }
      for (int lane = 0; lane < group.size; ++lane) {
        if (group.broadcast(u32(complete), lane) == 0) continue;
        return_sum(group, call, group.broadcast(row.source, lane), group.broadcast(row.token(), lane),
                   group.broadcast(row.slot(), lane));
      }
    }
  }
}

// Visit what comes back for a token, in a fixed order: visit(route, owner, slot) for each live route, or for
// the first live route of each owner when the owner has summed.
template <class Visit>
DEVICE void each_return(const Call& call, int token, Visit visit) {
  u32 slots = 0;
  for (int j = 0; j < kTopK; ++j) {
    const int target = call.args.route_target[u64(token) * kTopK + j];
    if (target < 0) continue;
    const int slot = target & 255;
    if (call.args.combine_by_rank) {
      if ((slots >> slot & 1) != 0) continue;
      slots |= 1u << slot;
    }
    visit(j, target >> 8, slot);
  }
}

template <class Group>
DEVICE bool combine_token(Group& group, const Call& call, int token) {
  const MoEArgs& args = call.args;
  bool here = true;
  each_return(call, token, [&](int j, int owner, int slot) {
    if (j % group.size == group.lane && here)
      here = wait_word(call, Await::returns, u32(owner), call.return_word(args.rank, token, slot));
  });
  if (group.any(!here)) return false;
  for (int column = group.lane * kVector; column < kHidden; column += group.size * kVector) {
    Sum sum;
    sum.clear();
    each_return(call, token, [&](int j, int, int slot) {
      const Acc weight = kWeightOnInput || args.combine_by_rank ? Acc(1) : Acc(args.topk_weights[u64(token) * kTopK + j]);
      sum.add(weight, call.return_row(args.rank, token, slot) + column);
    });
    *reinterpret_cast<Vector*>(args.y + u64(token) * kHidden + column) = sum.rounded();
  }
  return true;
}

// Every processor combines tokens when the task queue is exhausted; the rows it waits for are being computed.
template <class Group>
DEVICE void combine(Group& group, const Call& call) {
  while (true) {
    u32 token = 0;
    if (group.lane == 0) token = fetch_add_relaxed(&call.counters().combine_ticket, 1u);
    token = group.broadcast(token, 0);
    if (token >= u32(call.tokens)) return;
    if (!combine_token(group, call, int(token))) return;
  }
}
