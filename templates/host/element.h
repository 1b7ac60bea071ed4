// ---- Conversions, written with integer arithmetic so that every compiler vectorises them and gives the same bits -------
template <class To, class From>
DEVICE To bit_cast_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

//% if spec.dtype == "bfloat16"
struct Element {
  std::uint16_t bits;
};
DEVICE Acc to_acc(Element e) { return bit_cast_to<float>(u32(e.bits) << 16); }
DEVICE Element from_acc(Acc value) {  // round to nearest even; a NaN stays a NaN
  const u32 bits = bit_cast_to<u32>(value);
  const u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return Element{std::uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}
//% elif spec.dtype == "float16"
struct Element {
  std::uint16_t bits;
};
DEVICE Acc to_acc(Element e) {
  const u32 sign = u32(e.bits & 0x8000u) << 16;
  const u32 magnitude = u32(e.bits & 0x7fffu) << 13;
  // Exponent bias 15 to 127 by a multiplication, which also normalises subnormals; infinity and NaN take the second way.
  const float scaled = bit_cast_to<float>(magnitude) * 0x1p112f;
  const u32 finite = bit_cast_to<u32>(scaled);
  return bit_cast_to<float>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}
DEVICE Element from_acc(Acc value) {
  const u32 bits = bit_cast_to<u32>(value);
  const u32 sign = bits >> 16 & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round to nearest even in integers. Subnormal: the float adder rounds at the right bit.
  const u32 normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const u32 subnormal = bit_cast_to<u32>(bit_cast_to<float>(magnitude) + 0.5f) - 0x3f000000u;
  const u32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const u32 special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return Element{std::uint16_t(sign | (magnitude >= 0x47800000u ? special : finite))};
}
//% else
using Element = Acc;
DEVICE Acc to_acc(Element e) { return e; }
DEVICE Element from_acc(Acc value) { return value; }
//% endif
