// ---- Elements: conversions, all rounding to nearest even; a NaN stays a NaN ---------------------------------------------
//% if spec.dtype == "bfloat16"
struct Element {
  unsigned short bits;
};
DEVICE Acc to_acc(Element e) { return __uint_as_float(u32(e.bits) << 16); }
DEVICE Element from_acc(Acc value) { return Element{cvt_rn_bf16_f32(value)}; }
//% elif spec.dtype == "float16"
struct Element {
  unsigned short bits;
};
DEVICE Acc to_acc(Element e) { return cvt_f32_f16(e.bits); }
DEVICE Element from_acc(Acc value) { return Element{cvt_rn_f16_f32(value)}; }
//% else
using Element = Acc;
DEVICE Acc to_acc(Element e) { return e; }
DEVICE Element from_acc(Acc value) { return value; }
//% endif

// Two neighbours in a row.
//% if spec.element.size == 2
struct Pair {
  u32 bits;
};
//%   if spec.dtype == "bfloat16"
DEVICE Pair pair_of(Acc first, Acc second) { return Pair{cvt_rn_bf16x2_f32(second, first)}; }
//%   else
DEVICE Pair pair_of(Acc first, Acc second) { return Pair{cvt_rn_f16x2_f32(second, first)}; }
//%   endif
//% else
struct alignas(2 * sizeof(Element)) Pair {
  Element first, second;
};
DEVICE Pair pair_of(Acc first, Acc second) { return Pair{first, second}; }
//% endif
