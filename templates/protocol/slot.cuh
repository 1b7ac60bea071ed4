// ---- Slots: a task whose rows are looked up while the one before it runs -------------------------------------------------
// keep_row(slot, r, call, row) of the block program notes where the row r comes from, or where it goes.
template <class Group, class Slot>
DEVICE void look_up_rows(const Group& group, const Call& call, Slot& slot) {
  const Task task = slot.task;
  const Span span(call, Work::resolve, group.lane == 0, task.serial, task.column);
  each_row(group, call, task.block, 0, int(task.block.rows), [&](int r, const Row& row) {
    keep_row(slot, task, r, call, row);
    slot.weight[r] = row.entry.weight;
  });
}
