// ---- PTX, arithmetic ----------------------------------------------------------------------------------------------------

// Floating-Point, ex2: two to the power of v, within 2 ulp; subnormal results are 0.
DEVICE float ex2_approx_ftz(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}
