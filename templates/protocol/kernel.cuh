// ---- A call from begin to end, as one of its parties: a block (GPU) or a thread (host) ------------------------------------
// What differs between the block programs is their Party:
//   group                all threads of the party
//   Lanes, kLanes        those that schedule, dispatch and combine together, and how many such groups a party has
//   is_system(), role()  whether the party is of the OS, and what this thread is in it
//   processor(), processors(), parties()   its number among the processors, theirs, and how many leave
//   call(role)           begins the call, or reads it again: the epoch stands until every party has left
//   scratch<T>()         memory for planning and scheduling
//   run_tasks(call, able)   until the queue is closed; not able: planning failed, there is nothing to run
//   give_up()            instead of run_tasks(): whoever would run tasks together with this party is told

// By all threads of a party: whether no other launch of this rank runs at the same time. `found` is what lane 0 got from
// enter_call(), which takes a while to come.
template <class Party>
DEVICE bool alone(Party& party, const Call& call, u64 found) {
  const bool another = party.group.lane == 0 && !is_alone(call, found);
  if (another) abort_call(call, Await::launch, 0, call.epoch, found);
  return !party.group.any(another);
}

template <class Party>
DEVICE void run_system(Party& party, const Call& call) {
  typename Party::Lanes lanes;
  SystemScratch& scratch = party.template scratch<SystemScratch>();
  if (call.role == Role::scheduler) schedule(lanes, call, scratch);
  if (call.role == Role::subscriber) subscribe(lanes, call, scratch.arrived);
}

// False: this launch is not alone, and must not end the call of the other one.
template <class Party>
DEVICE bool process(Party& party, const Call& call, u64 found) {
  const int planners = num_planners(call, party.processors());
  PlannerScratch& scratch = party.template scratch<PlannerScratch>();
  const bool plans = party.processor() < planners;
  if (plans) count_routes(party.group, call, routes_of(call, party.processor(), planners), scratch);
  if (!alone(party, call, found)) {  // before anything is written that others see
    party.give_up();
    poison(party.group, call, u32(party.processor()), u32(party.processors()));
    return false;
  }
  bool able = true;
  if (plans) able = plan_routes(party.group, call, party.processor(), planners, scratch);
  typename Party::Lanes lanes;
  able = able && !party.group.any(!dispatch(lanes, call, planners));  // all lanes claim chunks for themselves
  party.run_tasks(call, able);
  // Read again rather than held in registers during the tasks.
  const Call end = party.call(Role::processor);
  if (!aborted(end)) combine(lanes, end, party.processors() * Party::kLanes);
  return true;
}

template <class Party>
DEVICE void run_party(Party& party) {
  const Role role = party.role();
  const Call call = party.call(role);
  const Span span(call, Work::kernel, party.group.lane == 0);
  const u64 found = party.group.lane == 0 ? enter_call(call) : 0;
  if (!party.is_system()) {
    if (!process(party, call, found)) return;
  } else {
    if (!alone(party, call, found)) return;
    run_system(party, call);
  }
  const Call end = party.call(role);  // read again, as in process()
  leave(party.group, end, end.party, end.parties);
}
