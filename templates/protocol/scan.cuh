// ---- Exclusive prefix sum of values[0..n) in place; returns the total. `spare` holds n words. ------------------------
template <class Group>
DEVICE u32 exclusive_scan(Group& group, u32* values, u32* spare, int n) {
  u32* from = values;
  u32* to = spare;
  group.sync();
  for (int distance = 1; distance < n; distance *= 2) {
    for (int i = group.lane; i < n; i += group.size) to[i] = from[i] + (i >= distance ? from[i - distance] : 0);
    group.sync();
    u32* const swap = from;
    from = to;
    to = swap;
  }
  const u32 total = n > 0 ? from[n - 1] : 0;
  // Shift the inclusive sums by one. The other buffer is free, and is the target when it is `values`.
  for (int i = group.lane; i < n; i += group.size) to[i] = i > 0 ? from[i - 1] : 0;
  group.sync();
  if (to != values) {
    for (int i = group.lane; i < n; i += group.size) values[i] = to[i];
    group.sync();
  }
  return total;
}
