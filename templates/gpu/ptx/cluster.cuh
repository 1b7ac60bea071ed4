// ---- PTX, shared memory of a cluster ------------------------------------------------------------------------------------

// Data Movement and Conversion, mapa: turns an address of this block into that of a block of its cluster.
DEVICE u32 mapa(u32 address, u32 block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

// Data Movement and Conversion, st.shared::cluster.
DEVICE void st_shared_cluster_v4(u32 to, uint4 v) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void st_shared_cluster(u32 to, u32 v) { asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }
