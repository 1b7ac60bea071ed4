// ---- Elements and 16-byte vectors of them -------------------------------------------------------------------------
constexpr int kVector = 16 / int(sizeof(Element));

struct alignas(16) Vector {
  Element element[kVector];
};

DEVICE Acc quiet_nan() {
  const Acc zero = 0;
  return zero / zero;
}
