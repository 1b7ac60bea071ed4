// ---- Selection: from the logits of one token to its experts and their weights ------------------------------------------
// A SelectGroup is a Group with two reductions over its lanes, whose order is fixed:
//   argmax(key, index)  index of the largest key, the lowest one among equal keys
//   sum(value)          the same bits on every lane

constexpr Key kTaken = 0;  // below every number: taken, or never in the choice
constexpr Key kNaN = 1;    // a NaN loses against every number, but is still an expert

// Unsigned integers in the order of the numbers; -0 and +0 are one key.
DEVICE Key key_of(Acc value) {
  if (value != value) return kNaN;
  value += Acc(0);
  Key bits;
  memcpy(&bits, &value, sizeof bits);
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// Which candidates are still in the choice, a bit each: lane l answers for l, l + size, ...
template <class Group>
struct Choice {
  static constexpr int kWords = (kMaxExperts / Group::size + 31) / 32;
  u32 open[kWords] = {};

  DEVICE u32& word(int i) {
    if constexpr (kWords == 1) return open[0];
    else return open[i / 32];
  }
  DEVICE void admit(const Group& group, int first, int last) {
    for (int i = first / Group::size; i * Group::size + group.lane < last; ++i)
      if (i * Group::size + group.lane >= first) word(i) |= 1u << i % 32;
  }
  // The candidate of the largest value, ties to the lowest. Every lane gets it; it leaves the choice.
  template <class Value>
  DEVICE int take(const Group& group, int candidates, Value value) {
    Key best = kTaken;
    int index = group.lane;
    for (int i = 0; i * Group::size + group.lane < candidates; ++i) {
      const int candidate = i * Group::size + group.lane;
      const Key key = (word(i) >> i % 32 & 1) != 0 ? key_of(value(candidate)) : kTaken;
      if (key > best) {
        best = key;
        index = candidate;
      }
    }
    const int winner = group.argmax(best, index);
    const int i = winner / Group::size;
    if (winner % Group::size == group.lane) word(i) &= ~(1u << i % 32);
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

template <class Group>
DEVICE Scoring scoring_of(Group& group, const Acc* logits, int experts) {
  Scoring scoring;
  if constexpr (kSoftmax) {
    Key best = kTaken;
    int index = group.lane;
    for (int e = group.lane; e < experts; e += Group::size) {
      const Key key = key_of(logits[e]);
      if (key > best) {
        best = key;
        index = e;
      }
    }
    scoring.largest = logits[group.argmax(best, index)];
    Acc sum = 0;
    for (int e = group.lane; e < experts; e += Group::size) sum += scoring.power(logits[e]);
    scoring.sum = group.sum(sum);
  }
  return scoring;
}

// A group's score over its `share` experts, which start at `first`; for the sum of two there are at least two.
template <class Value>
DEVICE Acc group_value(int first, int share, Value value) {
  Acc best = value(first);
  if constexpr (kTop2Groups) {
    Acc second = value(first + 1);
    for (int e = first + 1; e < first + share; ++e) {
      const Acc v = value(e);
      if (v > best) {
        second = best;
        best = v;
      } else if (v > second) {
        second = v;
      }
    }
    return best + second;
  } else {
    for (int e = first + 1; e < first + share; ++e) {
      const Acc v = value(e);
      if (v > best) best = v;
    }
    return best;
  }
}

// One token. `logits` [E] are complete, bias included, and visible to the whole group; they may become scores.
template <class Group>
DEVICE void select_experts(Group& group, const RouterArgs& args, Acc* logits, int* ids, float* weights) {
  const int experts = args.num_experts;
  const Scoring scoring = scoring_of(group, logits, experts);
  // Without a selection bias experts are compared by logit: the order is that of the scores, but different logits
  // do not tie because their scores round to the same number. Only sums of scores need the scores themselves.
  const bool biased = args.selection_bias != nullptr;
  if (biased) {
    group.sync();  // every lane has read the largest logit
    for (int e = group.lane; e < experts; e += Group::size) logits[e] = scoring.score(logits[e]);
    group.sync();
  }
  const auto score = [&](int e) { return biased ? logits[e] : scoring.score(logits[e]); };
  const auto value = [&](int e) { return biased ? logits[e] + Acc(args.selection_bias[e]) : logits[e]; };

  Choice<Group> choice;
  if (args.top_groups == args.num_groups) {
    choice.admit(group, 0, experts);
  } else {
    const int share = experts / args.num_groups;
    Choice<Group> groups;
    groups.admit(group, 0, args.num_groups);
    for (int i = 0; i < args.top_groups; ++i) {
      const int first = share * groups.take(group, args.num_groups, [&](int g) {
        return group_value(g * share, share, [&](int e) { return kTop2Groups && !biased ? score(e) : value(e); });
      });
      choice.admit(group, first, first + share);
    }
  }

  // Lane j % size keeps route j.
  constexpr int kKept = (kTopK + Group::size - 1) / Group::size;
  int kept_ids[kKept];
  Acc kept_scores[kKept];
  Acc total = 0;
  for (int j = 0; j < kTopK; ++j) {
    const int expert = choice.take(group, experts, value);
    const Acc unbiased = score(expert);
    total += unbiased;
    if (j % Group::size == group.lane) {
      kept_ids[j / Group::size] = expert;
      kept_scores[j / Group::size] = unbiased;
    }
  }
  for (int i = 0; i < kKept; ++i) {
    const int j = i * Group::size + group.lane;
    if (j >= kTopK) break;
    const Acc weight = kRenormalize ? kept_scores[i] / (total + Acc(1e-20)) : kept_scores[i];
    ids[j] = kept_ids[i];
    weights[j] = float(weight * Acc(kRoutedScale));
  }
}

// Tokens of this call: all, or as many as the device says.
DEVICE int token_count(const RouterArgs& args) {
  if (args.num_tokens == nullptr) return args.tokens;
  const int asked = *args.num_tokens;
  return asked < 0 ? 0 : asked < args.tokens ? asked : args.tokens;
}
