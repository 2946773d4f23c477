// Rows of the weight: their scales and zero points in float32, and their codes block by block; included once for each set
// of instructions, inside its namespace.

constexpr int kParts = 16 / kLanes;  // of the sixteen lanes in whose terms the order of k is told

constexpr int SizeOf(Number type) {
  return type == Number::kF32 ? 4 : type == Number::kBF16 || type == Number::kF16 ? 2 : 1;
}

template <Number kType> QJAX_INLINE F ReadNumbers(const uint8_t* p) {
  if constexpr (kType == Number::kF32) return Load(reinterpret_cast<const float*>(p));
  if constexpr (kType == Number::kBF16) return BFloatToFloat(reinterpret_cast<const uint16_t*>(p));
  if constexpr (kType == Number::kF16) return HalfToFloat(reinterpret_cast<const uint16_t*>(p));
  if constexpr (kType == Number::kE8M0) return E8M0ToFloat(p);
  if constexpr (kType == Number::kE4M3) return Mul(E4M3ToFloatOver256(p), Set1(256));
  return Int8ToFloat(p);
}

template <Number kType> static void ToFloatsFrom(const uint8_t* p, int64_t count, float* out) {
  constexpr int kStep = kLanes * SizeOf(kType);
  for (; count >= kLanes; count -= kLanes, p += kStep, out += kLanes) Store(out, ReadNumbers<kType>(p));
  uint8_t rest[kStep] = {};
  float values[kLanes];
  std::memcpy(rest, p, count * SizeOf(kType));
  Store(values, ReadNumbers<kType>(rest));
  std::memcpy(out, values, count * sizeof(float));
}

static void ToFloats(const Array& array, int64_t from, int64_t count, float* out) {
  const uint8_t* p = static_cast<const uint8_t*>(array.data) + from * SizeOf(array.type);
  switch (array.type) {
    case Number::kF32: return ToFloatsFrom<Number::kF32>(p, count, out);
    case Number::kBF16: return ToFloatsFrom<Number::kBF16>(p, count, out);
    case Number::kF16: return ToFloatsFrom<Number::kF16>(p, count, out);
    case Number::kE8M0: return ToFloatsFrom<Number::kE8M0>(p, count, out);
    case Number::kE4M3: return ToFloatsFrom<Number::kE4M3>(p, count, out);
    case Number::kInt8: return ToFloatsFrom<Number::kInt8>(p, count, out);
  }
}

// Scales of one row of the weight, and what zero points add to a weight: value * scale + offset.
class RowScales {
 public:
  explicit RowScales(const Product& p)
      : by_group_(New<float>(p.groups + kLanes)),  // and what Stretch reads behind them
        offset_by_group_(New<float>(p.groups + kLanes)),
        scale_(New<float>(p.blocks * p.slots)),
        offset_(New<float>(p.blocks * p.slots)) {
    std::memset(offset_.get(), 0, p.blocks * p.slots * sizeof(float));
  }

  // Reads those of row n; `factor` multiplies the scales.
  void Read(const Product& p, int64_t n, float factor) {
    const int64_t from = n / p.block_n * p.groups;
    float *s = by_group_.get(), *o = offset_by_group_.get();
    ToFloats(p.scale, from, p.groups, s);
    if (p.zero.data != nullptr) {
      ToFloats(p.zero, from, p.groups, o);
      const F middle = Set1(p.middle);
      for (int64_t g = 0; g < p.groups; g += kLanes) Store(o + g, Mul(Sub(middle, Load(o + g)), Load(s + g)));
    }
    if (factor != 1)
      for (int64_t g = 0; g < p.groups; g += kLanes) Store(s + g, Mul(Load(s + g), Set1(factor)));
    if (!p.slots_are_groups) Spread(p, s, scale_.get());
  }

  // After Read, where `offset` is wanted.
  void SpreadOffsets(const Product& p) {
    if (p.zero.data != nullptr) Spread(p, offset_by_group_.get(), offset_.get());
  }

  const float* scale(const Product& p) const { return (p.slots_are_groups ? by_group_ : scale_).get(); }
  const float* offset() const { return offset_.get(); }  // [blocks, slots], as scale

  // What zero points add to a product of a row of x, of which `sums` are those over groups.
  float DotOffsets(const Product& p, const float* sums) const {
    const float* offsets = offset_by_group_.get();
    F parts = Zero();
    int64_t g = 0;
    for (; g + kLanes <= p.groups; g += kLanes) parts = Fma(Load(offsets + g), Load(sums + g), parts);
    float total = Sum(parts);
    for (; g < p.groups; ++g) total += offsets[g] * sums[g];
    return total;
  }

 private:
  static void Spread(const Product& p, const float* from, float* to) {
    for (int64_t i = 0; i < p.blocks * p.slots; i += kLanes) Store(to + i, Stretch(from, &p.slot_group[i]));
  }

  Buffer<float> by_group_, offset_by_group_, scale_, offset_;
};

// A block of codes of row n: where it lies, or a copy filled up with zeros where K ends inside of it, which it does only of
// bytes. The copy is made without a call: one, taken or not, would have sums leave their registers at every block.
template <class D>
QJAX_INLINE const uint8_t* BlockOf(const Product& p, int64_t n, int64_t b, uint8_t* copy) {
  const uint8_t* at = p.codes + n * p.row_bytes + b * D::kBytes;
  if constexpr (D::kBytes < kBlock) return at;
  const int64_t left = p.row_bytes - b * D::kBytes;
  if (left >= D::kBytes) return at;
  for (int64_t i = 0; i < D::kBytes; ++i) copy[i] = i < left ? at[i] : 0;
  return copy;
}

// Codes of rows that are read from end to end are asked for so many bytes ahead: what a processor foresees ends with
// each page.
constexpr int64_t kAheadInRows = 12 << 10;

template <class D>
QJAX_INLINE void AskAhead(const uint8_t* block) {
  for (int at = 0; at < D::kBytes; at += 64) __builtin_prefetch(block + kAheadInRows + at);
}
