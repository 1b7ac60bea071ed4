// ---- Phase 0: count the routes, send the counts, write the lists ------------------------------------------------------
// Each planner takes a contiguous range of tokens. It counts its routes per expert, waits for the other planners of this
// rank, and then knows where its routes stand: a route's position among the rows of its expert from this rank, in
// token order. Counts go to every rank at once; list entries are sorted by expert, so the owner builds M-blocks from the counts
// alone. Those of this rank's own experts go into its heap, the others lie here, owner by owner, until dispatch sends them.
// Experts are numbered here by position: rank by rank, slot by slot.

constexpr int kTallies = int(sizeof(PlannerScratch::tally) / sizeof(u32));
constexpr u32 kNoRoute = 0xffffffffu;

DEVICE int num_planners(const Call& call, int most) {
  const int wanted = (call.tokens + kPlannerTokens - 1) / kPlannerTokens;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// The position of a route's expert, kNoRoute when it is masked (id < 0) or not an expert at all.
DEVICE u32 route_position(const MoEArgs& args, u64 route) {
  const int id = args.topk_ids[route];
  return id < 0 || id >= args.num_experts ? kNoRoute : u32(args.expert_position[id]);
}

// The planner's routes, of its tokens.
struct Range {
  u64 first, last;
};
DEVICE Range routes_of(const Call& call, int planner, int planners) {
  const int share = (call.tokens + planners - 1) / planners;
  const int from = planner * share < call.tokens ? planner * share : call.tokens;
  const int to = from + share < call.tokens ? from + share : call.tokens;
  return Range{u64(from) * kTopK, u64(to) * kTopK};
}

template <class Group>
DEVICE void count_routes(Group& group, const Call& call, Range routes, PlannerScratch& scratch) {
  const Span span(call, Work::count_routes, group.lane == 0);
  const MoEArgs& args = call.args;
  for (int q = group.lane; q < args.num_experts; q += group.size) scratch.count[q] = 0;
  for (int i = group.lane; i < kTallies; i += group.size) scratch.tally[i] = 0;
  group.sync();
  u32 masked = 0, invalid = 0;
  for (u64 route = routes.first + group.lane; route < routes.last; route += group.size) {
    const u32 position = route_position(args, route);
    if (position != kNoRoute) group.add(&scratch.count[position], 1u);
    else if (args.topk_ids[route] < 0) ++masked;
    else ++invalid;
  }
  group.add_all(&scratch.tally[u32(Tally::masked)], masked);
  group.add_all(&scratch.tally[u32(Tally::invalid)], invalid);
  group.sync();
}

// One addition for the whole planner: thousands of them to one word would take longer than the planning.
template <class Group>
DEVICE void add_tallies(Group& group, const MoEArgs& args, const PlannerScratch& scratch) {
  u64* const totals[kTallies] = {&args.state->routes, &args.state->dropped, &args.state->masked, &args.state->invalid};
  if (group.lane != 0) return;
  for (int i = 0; i < kTallies; ++i)
    if (scratch.tally[i] != 0) fetch_add_relaxed(totals[i], u64(scratch.tally[i]));
}

template <class Group>
DEVICE void send_counts(Group& group, const Call& call, int planner, int planners, const u32* total) {
  const MoEArgs& args = call.args;
  delay(call);
  for (int q = planner * group.size + group.lane; q < args.num_experts; q += planners * group.size) {
    const int owner = args.position_owner[q];
    send_word(call, call.count_words(owner, args.rank) + kCounts + (q - args.owner_first[owner]), total[q]);
  }
  if (planner != 0) return;
  for (int rank = group.lane; rank < args.world_size; rank += group.size) {
    send_word(call, call.count_words(rank, args.rank) + 1, args.tag);
    send_word(call, call.count_words(rank, args.rank), u32(call.tokens));
  }
}

// Where the list of each owner begins among all that is sent, and how many of its routes the planners before have.
template <class Group>
DEVICE void plan_owners(Group& group, const Call& call, int planner, u32 all, PlannerScratch& scratch) {
  const MoEArgs& args = call.args;
  for (int owner = group.lane; owner < args.world_size; owner += group.size) {
    const int begin = args.owner_first[owner], end = args.owner_first[owner + 1];
    u32 placed = 0;
    for (int q = begin; q < end; ++q) placed += scratch.base[q] < u32(args.capacity) ? scratch.base[q] : u32(args.capacity);
    scratch.placed[owner] = placed;
    if (planner == 0) args.outgoing_first[owner] = begin < args.num_experts ? scratch.offset[begin] : all;
  }
  if (planner == 0 && group.lane == 0) args.outgoing_first[args.world_size] = all;
  group.sync();
}

// The next numbers of counters, in route order: a planner's warps take them one after the other.
template <class Group>
DEVICE u32 take_in_order(Group& group, u32* counters, u32 which, bool valid, u64 start, u64 last) {
  u32 number = 0;
  for (int warp = 0; warp < group.warps && start + u64(warp) * group.kWarpLanes < last; ++warp) {
    if (warp == group.warp_index()) number = group.take_numbers(counters, which, valid);
    group.sync();
  }
  return number;
}

template <class Group>
DEVICE void write_lists(Group& group, const Call& call, u64 first, u64 last, PlannerScratch& scratch) {
  const Span span(call, Work::write_lists, group.lane == 0);
  const MoEArgs& args = call.args;
  u32 routes = 0, dropped = 0;
  for (u64 start = first; start < last; start += group.size) {
    const u64 route = start + group.lane;
    const u32 q = route < last ? route_position(args, route) : kNoRoute;
    const u32 position = take_in_order(group, scratch.base, q, q != kNoRoute, start, last);
    const bool live = q != kNoRoute && position < u32(args.capacity);
    const int owner = live ? args.position_owner[q] : -1;
    u32 place = 0;  // among the routes to the owner
    if (args.world_size > 1) place = take_in_order(group, scratch.placed, u32(owner), live, start, last);
    routes += live;
    dropped += q != kNoRoute && !live;
    if (route < last) args.route_owner[route] = owner;
    if (live) {
      const ListEntry entry{u32(route / kTopK) << 8 | u32(route % kTopK), args.topk_weights[route]};
      const u32 ordinal = scratch.offset[q] + position;
      if (owner == args.rank) {
        send_part(call.list(owner, owner) + (ordinal - scratch.offset[args.owner_first[owner]]), entry);
      } else {
        args.outgoing_list[ordinal] = entry;
        args.outgoing_summands[ordinal] = Summand{place, 0};
      }
    }
  }
  group.add_all(&scratch.tally[u32(Tally::live)], routes);
  group.add_all(&scratch.tally[u32(Tally::dropped)], dropped);
  group.sync();
  add_tallies(group, args, scratch);
}

// The counts of all planners together; base becomes what the planners before this one have.
template <class Group>
DEVICE bool add_counts(Group& group, const Call& call, int planner, int planners, PlannerScratch& scratch) {
  const MoEArgs& args = call.args;
  for (int q = group.lane; q < args.num_experts; q += group.size) scratch.base[q] = 0;
  if (planners == 1) return true;
  u32* const mine = args.planner_counts + u64(planner) * args.num_experts;
  for (int q = group.lane; q < args.num_experts; q += group.size) mine[q] = scratch.count[q];
  group.sync();
  bool counted = true;
  if (group.lane == 0) {
    const Span span(call, Work::wait_planners, true);
    delay(call);
    fetch_add_acq_rel(&call.counters().planners_counted, 1u);  // pairs with the wait of every other planner
    counted = wait_until(
        call, Await::planners, 0, u64(planners),
        [&] { return u64(load_acquire<Scope::device>(&call.counters().planners_counted)); },
        [&](u64 seen) { return seen == u64(planners); });
  }
  if (group.any(!counted)) return false;
  for (int q = group.lane; q < args.num_experts; q += group.size) {
    u32 total = 0, base = 0;
#pragma unroll 8
    for (int other = 0; other < planners; ++other) {
      const u32 count = args.planner_counts[u64(other) * args.num_experts + q];
      base += other < planner ? count : 0;
      total += count;
    }
    scratch.base[q] = base;
    scratch.count[q] = total;
  }
  return true;
}

// After count_routes().
template <class Group>
DEVICE bool plan_routes(Group& group, const Call& call, int planner, int planners, PlannerScratch& scratch) {
  const MoEArgs& args = call.args;
  const Range routes = routes_of(call, planner, planners);
  if (!add_counts(group, call, planner, planners, scratch)) return false;
  for (int q = group.lane; q < args.num_experts; q += group.size) {
    const u32 total = scratch.count[q];
    scratch.count[q] = scratch.offset[q] = total < u32(args.capacity) ? total : u32(args.capacity);
  }
  group.sync();
  send_counts(group, call, planner, planners, scratch.count);
  const u32 all = exclusive_scan(group, scratch.offset, args.num_experts);
  if (args.world_size > 1) plan_owners(group, call, planner, all, scratch);
  write_lists(group, call, routes.first, routes.last, scratch);
  group.sync();
  delay(call);
  if (group.lane == 0 && fetch_add_acq_rel(&call.counters().planners_listed, 1u) + 1 == u32(planners))
    store_release<Scope::device>(&call.counters().arrived[args.rank], kAllChunks);  // pairs with rows_arrived()
  return true;
}
