// ---- A call from begin to end, as one of its parties: a block (GPU) or a thread (host) ------------------------------------
// What differs between the block programs is their Party:
//   group                all threads of the party
//   Lanes, kLanes        those that schedule, dispatch and combine together, and how many such groups a party has
//   is_system(), role()  whether the party is of the OS, and what this thread is in it
//   processor(), processors(), parties()   its number among the processors, theirs, and how many leave
//   call(role)           begins the call, or reads it again: the epoch stands until every party has left
//   scratch<T>()         memory for planning and scheduling
//   run_tasks(call, able)   until the queue is closed; not able: planning failed, there is nothing to run
template <class Party>
DEVICE void run_system(Party& party, const Call& call) {
  typename Party::Lanes lanes;
  SystemScratch& scratch = party.template scratch<SystemScratch>();
  if (call.role == Role::scheduler) schedule(lanes, call, scratch);
  if (call.role == Role::subscriber) subscribe(lanes, call, scratch.arrived);
}

template <class Party>
DEVICE void process(Party& party, const Call& call) {
  const int planners = num_planners(call, party.processors());
  u64 entered = 0;  // looked at later: it takes a while to come
  if (party.group.lane == 0) entered = fetch_add_relaxed(entered_word(call), u64(1));
  bool able = true;
  if (party.processor() < planners)
    able = plan_routes(party.group, call, party.processor(), planners, party.template scratch<PlannerScratch>());
  if (party.group.lane == 0 && !is_alone(call, entered, u32(party.processors())))
    abort_call(call, Await::launch, 0, call.word(u32(party.processors())), entered);
  typename Party::Lanes lanes;
  able = able && !party.group.any(!dispatch(lanes, call, planners));  // all lanes claim chunks for themselves
  party.run_tasks(call, able);
  // Read again rather than held in registers during the tasks.
  const Call end = party.call(Role::processor);
  if (!aborted(end)) combine(lanes, end, party.processors() * Party::kLanes);
  else poison(party.group, end, u32(party.processor()), u32(party.processors()));  // of two launches at once only one has a last party
}

template <class Party>
DEVICE void run_party(Party& party) {
  const Role role = party.role();
  const Call call = party.call(role);
  const Span span(call, Work::kernel, party.group.lane == 0);
  if (party.is_system()) run_system(party, call);
  else process(party, call);
  leave(party.group, party.call(role), call.party, party.parties());
}
