// The product of codes on both sides for one instruction set, in int32; included once for each, inside its namespace.
//
//     y[m, n] = sum over groups of scale[n', k'] * (sum_k x[m, k] * (code[n, k] - zero[n', k']))        x and codes int8
//
// An instruction multiplies unsigned by signed bytes and adds four products, so codes are read as unsigned: int8 with the
// highest bit flipped (128 more), packed int4 as they are (8 more). What that adds, 128 or 8 times the sum of x, is taken
// off again where a block's sum begins (`corrections`): sums in int32 are those of the signed codes. With one scale a row
// all of K is summed so and rounded once; with groups each group's sum is exact and float32 holds their total.
//
// The order of k. The words of a block of int4 are sixteen lanes i = 4c + j (see kernels.h); their low nibbles are the
// bytes k = 32j + 2c + {0, 16, 1, 17}, the high ones lie 8 further. A block is two vectors of 64 bytes for both formats.

constexpr int kTileRows = 4;    // of x, that share a decoded block
constexpr int kWeightRows = 16; // that stay in the cache while rows of x pass

struct PackedNibbles {
  static constexpr int kBytes = 64;
  // The codes of a block, in parts of as many bytes as a vector has.
  static QJAX_INLINE void Read(const uint8_t* block, int part, I (&codes)[2]) {
    const I words = LoadWords(reinterpret_cast<const uint32_t*>(block) + part * kLanes), low = SetAll(0x0f0f0f0fu);
    codes[0] = And(words, low);
    codes[1] = And(ShiftRight<4>(words), low);
  }
};

struct FlippedBytes {
  static constexpr int kBytes = 128;
  static QJAX_INLINE void Read(const uint8_t* block, int part, I (&codes)[2]) {
    const auto* words = reinterpret_cast<const uint32_t*>(block) + part * kLanes;
    codes[0] = Xor(LoadWords(words), SetAll(0x80808080u));
    codes[1] = Xor(LoadWords(words + 16), SetAll(0x80808080u));
  }
};

// Row m0 + i of x in the kernels' order, what its blocks' sums begin with, its sums over groups.
static void PrepareCodes(const Product& p, int64_t m0, Rows& rows, int64_t i) {
  const auto* x = static_cast<const int8_t*>(p.x.data) + (m0 + i) * p.k;
  int8_t* out = rows.codes.get() + i * rows.stride;
  int32_t* corrections = rows.corrections.get() + i * p.blocks * 16;
  const bool packed = IsPacked(p.codes_type);
  for (int64_t b = 0; b < p.blocks; ++b, out += kBlock, corrections += 16) {
    std::memset(corrections, 0, 16 * sizeof(int32_t));
    for (int q = 0; q < kBlock; ++q) {
      const int half = q / 64, lane = q % 64 / 4, c = lane / 4, j = lane % 4;
      const int k = packed ? 32 * j + 8 * half + 2 * c + 16 * (q & 1) + (q >> 1 & 1) : q;
      out[q] = b * kBlock + k < p.k ? x[b * kBlock + k] : 0;
      corrections[lane] -= (packed ? 8 : 128) * out[q];
    }
  }
  if (p.zero.data == nullptr) return;
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t sum = 0;
    for (int64_t k = g * p.group; k < std::min(p.k, (g + 1) * p.group); ++k) sum += x[k];
    rows.sums.get()[i * p.groups + g] = float(sum);
  }
}

// y[m : m + kRows, n], without what zero points add.
template <class D, Scales kScales, int kRows>
static void MultiplyCodesOfRow(const Product& p, int64_t m0, const Rows& rows, int64_t m, int64_t n,
                               const float* scale) {
  uint8_t copy[D::kBytes];
  F total[kRows];
  I sum[kRows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    total[r] = Zero();
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) sum[r][part] = SetAll(0);
  }
  const bool one_sum = p.groups == 1;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const uint8_t* block = BlockOf<D>(p, n, b, copy);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      I codes[2];
      D::Read(block, part, codes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto* begin = reinterpret_cast<const uint32_t*>(rows.corrections.get()) +
                            ((m + r) * p.blocks + b) * 16 + part * kLanes;
        const auto* x = reinterpret_cast<const uint32_t*>(rows.codes.get() + (m + r) * rows.stride + b * kBlock) +
                        part * kLanes;
        sum[r][part] = AddWords(sum[r][part], LoadWords(begin));
        sum[r][part] = AddProducts(sum[r][part], codes[0], LoadWords(x));
        sum[r][part] = AddProducts(sum[r][part], codes[1], LoadWords(x + 16));
        if (one_sum) continue;
        const F by = kScales == Scales::kLanes ? Repeat4(scale + b * p.slots) : Set1(scale[b * p.slots]);
        total[r] = Fma(ToFloat(sum[r][part]), by, total[r]);
        sum[r][part] = SetAll(0);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    int32_t whole = 0;
    if (one_sum)
      for (int part = 0; part < kParts; ++part) whole += SumWords(sum[r][part]);
    p.y[(m0 + m + r) * p.n + n] = one_sum ? float(whole) * scale[0] : Sum(total[r]);
  }
}

template <class D, Scales kScales>
static void MultiplyCodesScaled(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  std::vector<RowScales> scales;
  for (int i = 0; i < kWeightRows; ++i) scales.emplace_back(p);
  for (int64_t first = n0; first < n1; first += kWeightRows) {
    const int64_t count = std::min<int64_t>(kWeightRows, n1 - first);
    for (int64_t r = 0; r < count; ++r) scales[r].Read(p, first + r, 1);
    for (int64_t m = 0; m < rows.m; m += rows.m - m < kTileRows ? 1 : kTileRows)
      for (int64_t r = 0; r < count; ++r)
        (rows.m - m < kTileRows ? MultiplyCodesOfRow<D, kScales, 1> : MultiplyCodesOfRow<D, kScales, kTileRows>)(
            p, m0, rows, m, first + r, scales[r].scale(p));
    if (p.zero.data == nullptr) continue;
    for (int64_t m = 0; m < rows.m; ++m)
      for (int64_t r = 0; r < count; ++r)
        p.y[(m0 + m) * p.n + first + r] += scales[r].DotOffsets(p, rows.sums.get() + m * p.groups);
  }
}

static void MultiplyInt8(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  if (!IsPacked(p.codes_type)) return MultiplyCodesScaled<FlippedBytes, Scales::kOne>(p, m0, rows, n0, n1);
  if (p.scales == Scales::kOne) return MultiplyCodesScaled<PackedNibbles, Scales::kOne>(p, m0, rows, n0, n1);
  MultiplyCodesScaled<PackedNibbles, Scales::kLanes>(p, m0, rows, n0, n1);
}
