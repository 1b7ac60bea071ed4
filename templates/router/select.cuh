// ---- Selection: from the logits of one token to its experts and their weights ------------------------------------------
// A SelectGroup is a Group with two reductions over its lanes, whose order is fixed:
//   argmax(key, index)  index of the largest key, the lowest one among equal keys
//   sum(value)          the same bits on every lane

constexpr Key kTaken = 0;  // below every number: taken, or never in the choice
constexpr Key kNaN = 1;    // a NaN loses against every number, but is still an expert

constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);

// Unsigned integers in the order of the numbers; -0 and +0 are one key.
DEVICE Key key_of(Acc value) {
  if (value != value) return kNaN;
  value += Acc(0);
  Key bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}
DEVICE Acc number_of(Key key) {  // kNaN gives a NaN
  const Key bits = (key & kSign) != 0 ? key ^ kSign : ~key;
  Acc value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The candidates of one choice, at most kMost, as keys in registers: lane l holds those of l, l + size, ...
template <class Group, int kMost>
struct Choice {
  static constexpr int kHeld = (kMost + Group::size - 1) / Group::size;
  static constexpr bool kCrowded = kHeld * sizeof(Key) > 32;  // what is done for all at once would not fit the registers
  Key held[kHeld] = {};

  template <class Value>
  DEVICE void admit(const Group& group, int candidates, Value value) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int candidate = i * Group::size + group.lane;
      const bool inside = candidate < candidates;
      const Key key = key_of(value(inside ? candidate : 0));  // a load without a branch does not wait for the one before
      held[i] = inside ? key : kTaken;
    }
  }
  // Only those of `chosen` groups of `share` candidates each stay.
  DEVICE void keep(const Group& group, Choice& groups, int chosen, int share) {
    u32 kept[(kHeld + 31) / 32] = {};
#pragma unroll 1
    for (int n = 0; n < chosen; ++n) {
      const int first = groups.take(group) * share;
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (u32(i * Group::size + group.lane - first) < u32(share)) kept[i / 32] |= 1u << i % 32;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if ((kept[i / 32] >> i % 32 & 1) == 0) held[i] = kTaken;
  }
  DEVICE void put(int place, Key key) {  // held[place], which no register can be indexed by
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i == place) held[i] = key;
  }
  // The candidate of the largest value, ties to the lowest. Every lane gets it.
  DEVICE int leader(const Group& group) const {
    Key best = kTaken;
    int index = group.lane;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held[i] > best) {
        best = held[i];
        index = i * Group::size + group.lane;
      }
    }
    return group.argmax(best, index);
  }
  DEVICE int take(const Group& group) {
    const int winner = leader(group);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i * Group::size + group.lane == winner) held[i] = kTaken;
    return winner;
  }
};

// What turns a logit of this token into a score: for softmax, the largest logit and the sum over all experts.
struct Scoring {
  Acc largest = 0;
  Acc sum = 1;

  DEVICE Acc power(Acc logit) const { return exp_of(logit - largest); }
  DEVICE Acc score(Acc logit) const {
    if constexpr (kSoftmax) return power(logit) / sum;
    else return Acc(1) / (Acc(1) + exp_of(-logit));
  }
};

// `choice` has the logits of all experts.
template <class Group, int kMost>
DEVICE Scoring scoring_of(const Group& group, const Choice<Group, kMost>& choice, const Acc* logits) {
  Scoring scoring;
  if constexpr (kSoftmax) {
    scoring.largest = logits[choice.leader(group)];
    Acc sum = 0;
#pragma unroll
    for (const Key key : choice.held) {
      if (choice.kCrowded && key == kTaken) continue;
      const Acc power = scoring.power(number_of(key));
      sum += key != kTaken ? power : Acc(0);
    }
    scoring.sum = group.sum(sum);
  }
  return scoring;
}

// A group's score over its `share` experts, which start at `first`: of its best ones in the order of the keys, so that it does
// not matter where in the group a NaN is. For the sum of two there are at least two.
template <class Value>
DEVICE Key group_key(int first, int share, Value value) {
  Key best = kTaken, second = kTaken;
  for (int e = first; e < first + share; ++e) {
    const Key key = key_of(value(e));
    if (key > best) {
      second = best;
      best = key;
    } else if (kTop2Groups && key > second) {
      second = key;
    }
  }
  return kTop2Groups ? key_of(number_of(best) + number_of(second)) : best;
}

// The way of one token to its experts.
template <class Group, int kMost>
struct Selection {
  static constexpr int kKept = (kTopK + Group::size - 1) / Group::size;
  Acc* logits;
  bool stored;  // else it only keeps another one company: it stores nothing
  Choice<Group, kMost> choice;
  Scoring scoring;
  int kept[kKept];  // lane j % size keeps the expert of route j

  DEVICE void read(const Group& group, int experts) {
    choice.admit(group, experts, [&](int e) { return logits[e]; });
  }
  DEVICE void score(const Group& group) { scoring = scoring_of(group, choice, logits); }

  // Without a selection bias experts are compared by logit: the order is that of the scores, but different logits
  // do not tie because their scores round to the same number. Only sums of scores need the scores themselves.
  DEVICE void admit(Group& group, const RouterArgs& args) {
    const int experts = args.num_experts;
    const bool biased = args.selection_bias != nullptr;
    const auto value = [&](int e) { return logits[e] + (biased ? Acc(args.selection_bias[e]) : Acc(0)); };
    if (biased) {
      group.sync();  // every lane has read the largest logit
#pragma unroll
      for (int i = 0; i < choice.kHeld; ++i) {
        const int e = i * Group::size + group.lane;
        if (choice.kCrowded && e >= experts) break;
        const Acc score = scoring.score(number_of(choice.held[i]));
        if (stored && e < experts) logits[e] = score;
      }
      group.sync();
      choice.admit(group, experts, value);
    }
    if (args.top_groups < args.num_groups) {
      const int share = experts / args.num_groups;
      const auto compared = [&](int e) { return kTop2Groups && !biased ? scoring.score(logits[e]) : value(e); };
      Choice<Group, kMost> groups;
#pragma unroll 1
      for (int g = group.lane; g < args.num_groups; g += Group::size)
        groups.put(g / Group::size, group_key(g * share, share, compared));
      choice.keep(group, groups, args.top_groups, share);
    }
  }

  DEVICE void finish(const Group& group, const RouterArgs& args, int* ids, float* weights) const {
    Acc scores[kKept];
    Acc total = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i * Group::size + group.lane >= kTopK) break;
      const Acc logit = logits[kept[i]];
      scores[i] = args.selection_bias != nullptr ? logit : scoring.score(logit);
      total += scores[i];
    }
    if constexpr (kRenormalize) total = group.sum(total);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int j = i * Group::size + group.lane;
      if (j >= kTopK || !stored) break;
      const Acc weight = kRenormalize ? scores[i] / (total + Acc(1e-20)) : scores[i];
      ids[j] = kept[i];
      weights[j] = float(weight * Acc(kRoutedScale));
    }
  }
};

// kTokens tokens at once, whose chains of reductions overlap.
template <int kMost, int kTokens, class Group>
DEVICE void select_among(Group& group, const RouterArgs& args, Acc* logits, int* ids, float* weights, int tokens) {
  using One = Selection<Group, kMost>;
  One selections[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    selections[t].stored = t < tokens;
    selections[t].logits = logits + (t < tokens ? t * args.num_experts : 0);
    selections[t].read(group, args.num_experts);
  }
#pragma unroll
  for (One& one : selections) one.score(group);
#pragma unroll
  for (One& one : selections) one.admit(group, args);
#pragma unroll
  for (int i = 0; i < One::kKept; ++i) {
    const int left = kTopK - i * Group::size;
#pragma unroll 1
    for (int lane = 0; lane < left && lane < Group::size; ++lane) {
#pragma unroll
      for (One& one : selections) {
        const int expert = one.choice.take(group);
        if (lane == group.lane) one.kept[i] = expert;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) selections[t].finish(group, args, ids + t * kTopK, weights + t * kTopK);
}

// The first `tokens` of kTokens neighbours. `logits` [tokens, E] are complete, bias included, and visible to the whole group;
// they may become scores.
template <int kTokens = 1, class Group>
DEVICE void select_experts(Group& group, const RouterArgs& args, Acc* logits, int* ids, float* weights, int tokens = kTokens) {
  const int experts = args.num_experts;
  if (experts <= 128) {
    select_among<128, kTokens>(group, args, logits, ids, weights, tokens);
  } else if (experts <= 256) {
    select_among<256, kTokens>(group, args, logits, ids, weights, tokens);
  } else {
#pragma unroll 1
    for (int t = 0; t < kTokens && t < tokens; ++t)
      select_among<kMaxExperts, 1>(group, args, logits + t * experts, ids + t * kTopK, weights + t * kTopK, 1);
  }
}

// Tokens of this call: all, or as many as the device says.
DEVICE int token_count(const RouterArgs& args) {
  if (args.num_tokens == nullptr) return args.tokens;
  const int asked = *args.num_tokens;
  return asked < 0 ? 0 : asked < args.tokens ? asked : args.tokens;
}
