// ---- PTX, conversions ---------------------------------------------------------------------------------------------------

// Data Movement and Conversion, cvt.
DEVICE unsigned short cvt_rn_bf16_f32(float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
DEVICE u32 cvt_rn_bf16x2_f32(float high, float low) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DEVICE unsigned short cvt_rn_f16_f32(float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
DEVICE u32 cvt_rn_f16x2_f32(float high, float low) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DEVICE float cvt_f32_f16(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
DEVICE u32 cvt_rna_tf32_f32(u32 bits) {
  u32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
