// A row of x -> int8 codes and a scale, for one instruction set; included once for each, inside its namespace.
//
//     scale = max |x| / 127, 1 where that is 0;  code = round(x / scale), half to even
//
// Of a row that is not finite the scale is NaN, as in `qjax.activations`, and codes are 0.

constexpr float kTop = 127;

static void QuantizeRow(const Array& x, int64_t row, int64_t k, int8_t* codes, float* scale) {
  const int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
  const Buffer<float> values = New<float>(padded);
  float* v = values.get();
  ToFloats(x, row * k, k, v);
  std::fill(v + k, v + padded, 0.0f);
  F largest = Zero(), strange = Zero();  // the second is 0 where all numbers are finite
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F a = Load(v + i);
    largest = Max(largest, Abs(a)), strange = Add(strange, Sub(a, a));
  }
  float lanes[kLanes], amax = 0;
  Store(lanes, largest);
  for (float a : lanes) amax = std::max(amax, a);
  *scale = amax / kTop == 0 ? 1 : amax / kTop;
  if (Sum(strange) != 0) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, k);
    return;
  }
  const F divisor = Set1(*scale);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) StoreRounded(codes + i, Div(Load(v + i), divisor));
  int8_t last[kLanes] = {};
  if (i < k) StoreRounded(last, Div(Load(v + i), divisor));
  std::memcpy(codes + i, last, k - i);
}
