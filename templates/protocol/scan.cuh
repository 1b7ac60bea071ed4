// ---- Exclusive prefix sum of values[0..n) in place; every lane gets the total -------------------------------------------
template <class Group>
DEVICE u32 exclusive_scan(Group& group, u32* values, int n) {
  u32 before = 0;
  group.sync();
  for (int first = 0; first < n; first += group.size) {
    const int i = first + group.lane;
    u32 total = 0;
    const u32 sum = group.exclusive_sum(i < n ? values[i] : 0, &total);
    if (i < n) values[i] = before + sum;
    before += total;
  }
  group.sync();
  return before;
}
