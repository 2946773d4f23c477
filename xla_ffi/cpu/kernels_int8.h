// The product of codes on both sides for one instruction set, in int32; included once for each, inside its namespace.
//
//     y[m, n] = sum over groups of scale[n', k'] * (sum_k x[m, k] * (code[n, k] - zero[n', k']))        x and codes int8
//
// An instruction multiplies unsigned by signed bytes and adds four products, so codes are read as unsigned: int8 with the
// highest bit flipped (128 more), packed int4 as they are (8 more). What that adds, 128 or 8 times the sum of x, is taken
// off again, in int32: at the end of a row with one scale, whose sum is exact and rounded once; with groups where the sum
// of a block begins (`corrections`), and float32 holds the total of the scaled blocks.
//
// The order of k. The words of a block of int4 are sixteen lanes i = 4c + j (see kernels.h); their low nibbles are the
// bytes k = 32j + 2c + {0, 16, 1, 17}, the high ones lie 8 further. A block is two vectors of 64 bytes for both formats.

constexpr int kTileRows = 4;    // of x, that share a decoded block
constexpr int kWeightRows = 16; // that stay in the cache while more rows of x pass

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

// Where in a block of x stands what meets code `i` of packed int4.
constexpr std::array<uint8_t, kBlock> MakeNibblePositions() {
  std::array<uint8_t, kBlock> positions{};
  for (int i = 0; i < kBlock; ++i) {
    const int half = i / 64, lane = i % 64 / 4, c = lane / 4, j = lane % 4;
    positions[i] = 32 * j + 8 * half + 2 * c + 16 * (i & 1) + (i >> 1 & 1);
  }
  return positions;
}
constexpr std::array<uint8_t, kBlock> kNibblePositions = MakeNibblePositions();

// Row m0 + i of x in the kernels' order, what takes off the codes' offsets, its sums over groups.
static void PrepareCodes(const Product& p, int64_t m0, Rows& rows, int64_t i) {
  const auto* x = static_cast<const int8_t*>(p.x.data) + (m0 + i) * p.k;
  int8_t* out = rows.codes.get() + i * rows.stride;
  int32_t* corrections = rows.corrections.get() + i * p.blocks * 16;
  const bool packed = IsPacked(p.codes_type);
  const I offset = SetAll(packed ? 0x08080808u : 0x80808080u);  // of each code
  int32_t whole = 0;
  for (int64_t k = 0; k < p.k; k += kBlock, out += kBlock, corrections += 16) {
    const int64_t count = std::min(kBlock, p.k - k);
    int8_t straight[kBlock];
    int8_t* block = packed ? straight : out;
    std::memcpy(block, x + k, count);
    std::memset(block + count, 0, kBlock - count);
    for (int q = 0; packed && q < kBlock; ++q) out[q] = straight[kNibblePositions[q]];
    for (int part = 0; part < kParts; ++part) {
      const auto* words = reinterpret_cast<const uint32_t*>(out) + part * kLanes;
      const I more = AddProducts(AddProducts(SetAll(0), offset, LoadWords(words)), offset, LoadWords(words + 16));
      const I less = AddWords(Xor(more, SetAll(~0u)), SetAll(1));
      std::memcpy(corrections + part * kLanes, &less, sizeof less);
      whole += SumWords(less);
    }
  }
  rows.whole_corrections.get()[i] = whole;
  if (p.zero.data == nullptr) return;
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t sum = 0;
    for (int64_t k = g * p.group; k < std::min(p.k, (g + 1) * p.group); ++k) sum += x[k];
    rows.sums.get()[i * p.groups + g] = float(sum);
  }
}

// How a row of the weight is summed: as a whole, or block by block with one scale or one for each 32 of k.
enum class Sums { kWhole, kBlocks, kLanes };

// y[m : m + kRows, n], without what zero points add. kFirst: these rows of x are the first to meet that of the weight.
template <class D, Sums kSums, int kRows, bool kFirst>
static void MultiplyCodesOfRow(const Product& p, int64_t m0, const Rows& rows, int64_t m, int64_t n,
                               const float* scale) {
  uint8_t copy[D::kBytes];
  F total[kRows];
  I whole[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) total[r] = Zero(), whole[r] = SetAll(0);
  for (int64_t b = 0; b < p.blocks; ++b) {
    const uint8_t* block = BlockOf<D>(p, n, b, copy);
    if constexpr (kFirst) AskAhead<D>(block);
    const F by = kSums == Sums::kLanes ? Repeat4(scale + b * p.slots) : Set1(kSums == Sums::kBlocks ? scale[b] : 0);
    for (int part = 0; part < kParts; ++part) {
      I codes[2];
      D::Read(block, part, codes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto* x = reinterpret_cast<const uint32_t*>(rows.codes.get() + (m + r) * rows.stride + b * kBlock) +
                        part * kLanes;
        const auto* begin = reinterpret_cast<const uint32_t*>(rows.corrections.get()) +
                            ((m + r) * p.blocks + b) * 16 + part * kLanes;
        I sum = kSums == Sums::kWhole ? whole[r] : LoadWords(begin);
        sum = AddProducts(AddProducts(sum, codes[0], LoadWords(x)), codes[1], LoadWords(x + 16));
        if constexpr (kSums == Sums::kWhole)
          whole[r] = sum;
        else
          total[r] = Fma(ToFloat(sum), by, total[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    p.y[(m0 + m + r) * p.n + n] = kSums == Sums::kWhole
                                      ? float(SumWords(whole[r]) + rows.whole_corrections.get()[m + r]) * scale[0]
                                      : Sum(total[r]);
}

template <class D, Sums kSums>
static void MultiplyCodesSummed(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  constexpr decltype(&MultiplyCodesOfRow<D, kSums, 1, true>) kKernels[2][kTileRows] = {
      {MultiplyCodesOfRow<D, kSums, 1, false>, MultiplyCodesOfRow<D, kSums, 2, false>,
       MultiplyCodesOfRow<D, kSums, 3, false>, MultiplyCodesOfRow<D, kSums, 4, false>},
      {MultiplyCodesOfRow<D, kSums, 1, true>, MultiplyCodesOfRow<D, kSums, 2, true>,
       MultiplyCodesOfRow<D, kSums, 3, true>, MultiplyCodesOfRow<D, kSums, 4, true>}};
  std::vector<RowScales> scales;
  // Rows that are used once are read alternately with their scales: each of the two is then one stream from memory.
  const int64_t at_once = rows.m <= kTileRows ? 1 : kWeightRows;
  for (int i = 0; i < at_once; ++i) scales.emplace_back(p);
  for (int64_t first = n0; first < n1; first += at_once) {
    const int64_t count = std::min(at_once, n1 - first);
    for (int64_t r = 0; r < count; ++r) scales[r].Read(p, first + r, 1);
    for (int64_t m = 0; m < rows.m; m += kTileRows) {
      const auto multiply = kKernels[m == 0][std::min<int64_t>(kTileRows, rows.m - m) - 1];
      for (int64_t r = 0; r < count; ++r) multiply(p, m0, rows, m, first + r, scales[r].scale(p));
    }
    if (p.zero.data == nullptr) continue;
    for (int64_t m = 0; m < rows.m; ++m)
      for (int64_t r = 0; r < count; ++r)
        p.y[(m0 + m) * p.n + first + r] += scales[r].DotOffsets(p, rows.sums.get() + m * p.groups);
  }
}

template <class D>
static void MultiplyCodesBy(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  if (p.groups == 1) return MultiplyCodesSummed<D, Sums::kWhole>(p, m0, rows, n0, n1);
  if (p.scales == Scales::kOne) return MultiplyCodesSummed<D, Sums::kBlocks>(p, m0, rows, n0, n1);
  MultiplyCodesSummed<D, Sums::kLanes>(p, m0, rows, n0, n1);
}

static void MultiplyInt8(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  (IsPacked(p.codes_type) ? MultiplyCodesBy<PackedNibbles> : MultiplyCodesBy<FlippedBytes>)(p, m0, rows, n0, n1);
}
