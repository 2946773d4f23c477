// The product for one instruction set, in terms of its vectors; included once for each, inside its namespace.
//
//     y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n', k']) * scale[n', k']       n' = n / block_n, k' = k / group
//
// The order of k. Packed codes of a block of 128 are decoded where they lie: sixteen lanes i = 4c + j hold a word each of
// the plane of 4 bits (a plane of 2 or 1 has its words repeated and shifted so that they lie alike), and step p = 4l + 2s
// + h takes the p-th code of all lanes,  k = 32j + 16s + 8h + 2c + l.  x is brought into that order once a call, so that
// decoding needs no shuffles. A group of 32 k is then a lane of every four, of 16 k one of (s, j). Codes of a byte keep
// their order: step p is k = 16p + lane. Narrower vectors take the sixteen lanes in parts.
//
// Few rows of x: codes go from registers into the sums (kernels_few.h). More rows: a panel of 32 rows of the weight by
// 128 k is dequantized into the cache and multiplied by all rows of x in tiles of registers. Every element of y is one
// chain of additions whose order depends on K and M alone.

constexpr int kTileM = 4;
constexpr int kPanelRows = 32;  // with one block of x's tile in half of the first level of the cache
constexpr int kAhead = 4;       // blocks: how far codes of a row are asked for before they are decoded

// ---- decoders: the value of 16 codes at a step, before zero point and scale ------------------------------------------

// Integers of 2 to 6 bits less their middle. The plane with the highest bit is read as signed once that bit is flipped.
template <int kBits>
struct PackedInt {
  static constexpr int kTop = kBits == 3 || kBits == 5 ? 1 : kBits == 6 ? 2 : kBits;
  static constexpr int kLow = kBits - kTop;
  static constexpr int kBytes = 16 * kBits;
  static constexpr bool kPacked = true;
  static constexpr float kFactor = 1;
  struct Words {
    I low, top;
  };

  explicit PackedInt(const Product&) {}

  template <int kPlane> QJAX_INLINE I Plane(const uint32_t* words, int part) const {
    if constexpr (kPlane == 4) return LoadWords(words + part * kLanes);
    if constexpr (kPlane == 2) return LoadPairs(words + part * kLanes / 2);
    if constexpr (kPlane == 1) return LoadQuads(words + part * kLanes / 4);
  }
  QJAX_INLINE Words Read(const uint8_t* block, int part) const {
    const auto* words = reinterpret_cast<const uint32_t*>(block);
    const I flip = SetAll(kTop == 4 ? 0x88888888u : kTop == 2 ? 0xaaaaaaaau : 0xffffffffu);
    Words w{};
    if constexpr (kLow > 0) w.low = Plane<kLow>(words, part);
    w.top = Xor(Plane<kTop>(words + 4 * kLow, part), flip);
    return w;
  }
  static QJAX_INLINE void KeepWords(Words& w) {
    if constexpr (kLow > 0) Keep(w.low);
    Keep(w.top);
  }
  template <int kP> QJAX_INLINE F Value(const Words& w) const {
    const I code = ShiftSigned<32 - kTop>(ShiftLeft<32 - kTop - 16 * (kP / 4) - kTop * (kP % 4)>(w.top));
    if constexpr (kLow == 0) return ToFloat(code);
    const I low = And(ShiftRight<16 * (kP / 4) + kLow * (kP % 4)>(w.low), SetAll((1u << kLow) - 1));
    return ToFloat(Or(ShiftLeft<kLow>(code), low));
  }
};

// Indices of 4 bits.
struct PackedTable {
  static constexpr int kBytes = 64;
  static constexpr bool kPacked = true;
  static constexpr float kFactor = 1;
  using Words = I;
  Table16 table;

  explicit PackedTable(const Product& p) : table(MakeTable16(p.table)) {}

  QJAX_INLINE Words Read(const uint8_t* block, int part) const {
    return LoadWords(reinterpret_cast<const uint32_t*>(block) + part * kLanes);
  }
  static QJAX_INLINE void KeepWords(Words& w) { Keep(w); }
  template <int kP> QJAX_INLINE F Value(Words w) const { return Lookup16<kP>(table, w); }
};

using PackedInt4 = std::conditional_t<kTableIsFastest, PackedTable, PackedInt<4>>;

struct Bytes {
  static constexpr int kBytes = 128;
  static constexpr bool kPacked = false;
  static constexpr float kFactor = 1;
  using Words = const uint8_t*;

  explicit Bytes(const Product&) {}

  QJAX_INLINE Words Read(const uint8_t* block, int part) const { return block + part * kLanes; }
  static QJAX_INLINE void KeepWords(Words&) {}
};

struct Int8 : Bytes {
  using Bytes::Bytes;
  template <int kP> QJAX_INLINE F Value(Words w) const { return Int8ToFloat(w + 16 * kP); }
};

struct E5M2 : Bytes {
  using Bytes::Bytes;
  template <int kP> QJAX_INLINE F Value(Words w) const { return E5M2ToFloat(w + 16 * kP); }
};

struct E4M3 : Bytes {
  using Bytes::Bytes;
  static constexpr float kFactor = 256;  // scales are multiplied by it
  template <int kP> QJAX_INLINE F Value(Words w) const { return E4M3ToFloatOver256(w + 16 * kP); }
};

struct ByteTable : Bytes {
  const float* table;
  explicit ByteTable(const Product& p) : Bytes(p), table(p.table) {}
  template <int kP> QJAX_INLINE F Value(Words w) const { return Lookup256(table, w + 16 * kP); }
};

// Where in a block of x stands what meets code `i` of the kernels' order.
constexpr std::array<int32_t, kBlock> MakePackedPositions() {
  std::array<int32_t, kBlock> positions{};
  for (int i = 0; i < kBlock; ++i) {
    const int p = i / 16, c = i % 16 / 4, j = i % 4;
    positions[i] = 32 * j + 16 * (p >> 1 & 1) + 8 * (p & 1) + 2 * c + (p >> 2);
  }
  return positions;
}
constexpr std::array<int32_t, kBlock> kPackedPositions = MakePackedPositions();

// Row m0 + i of x in float32; along K in the kernels' order, and with its sums over groups.
static void Prepare(const Product& p, int64_t m0, Rows& rows, int64_t i) {
  float* out = rows.values.get() + i * rows.stride;
  const int64_t from = (m0 + i) * p.depth();
  if (p.transposed) return ToFloats(p.x, from, p.n, out);
  const bool packed = IsPacked(p.codes_type);
  float* sums = p.zero.data == nullptr ? nullptr : rows.sums.get() + i * p.groups;
  if (sums != nullptr) std::memset(sums, 0, p.groups * sizeof(float));
  for (int64_t k = 0; k < p.k; k += kBlock, out += rows.block_stride) {
    const int64_t count = std::min(kBlock, p.k - k);
    float straight[kBlock];
    float* block = packed ? straight : out;
    ToFloats(p.x, from + k, count, block);
    std::memset(block + count, 0, (kBlock - count) * sizeof(float));
    for (int64_t at = 0; sums != nullptr && at < count; at += 16) {  // groups are multiples of it
      F sum = Load(block + at);
      for (int part = 1; part < kParts; ++part) sum = Add(sum, Load(block + at + part * kLanes));
      sums[(k + at) / p.group] += Sum(sum);
    }
    for (int at = 0; packed && at < kBlock; ++at) out[at] = straight[kPackedPositions[at]];
  }
}

// ---- scales of a block -----------------------------------------------------------------------------------------------

template <class D, Scales kScales, int kP> QJAX_INLINE F ScaleAt(const float* block) {
  if constexpr (kScales == Scales::kOne) return Set1(block[0]);
  if constexpr (kScales == Scales::kLanes) return Repeat4(block);
  if constexpr (D::kPacked) return RepeatEveryOther4<kP / 2 % 2>(block);
  return Set1(block[kP]);
}

#include "kernels_few.h"

// ---- more rows of x --------------------------------------------------------------------------------------------------

template <class D, Scales kScales, int kP>
QJAX_INLINE void DecodeStep(const D& d, const typename D::Words& words, const float* scale, const float* offset,
                            float* out) {
  const F value = d.template Value<kP>(words);
  Store(out + 16 * kP, Fma(value, ScaleAt<D, kScales, kP>(scale), ScaleAt<D, kScales, kP>(offset)));
}

// 128 weights in float32.
template <class D, Scales kScales>
static void DecodeBlock(const D& d, const uint8_t* block, const float* scale, const float* offset, float* out) {
  for (int part = 0; part < kParts; ++part) {
    const auto words = d.Read(block, part);
    float* at = out + part * kLanes;
    DecodeStep<D, kScales, 0>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 1>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 2>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 3>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 4>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 5>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 6>(d, words, scale, offset, at);
    DecodeStep<D, kScales, 7>(d, words, scale, offset, at);
  }
}

// sums[n] += x[m] . w[n] over a block of k for kM rows of x; every fourth lane of a vector of sums belongs to one row.
template <int kM>
static void MultiplyTile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, float* sums) {
  F sum[kTileN][kTileM];
#pragma GCC unroll 4
  for (int n = 0; n < kTileN; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < kTileM; ++m) sum[n][m] = Zero();
  for (int64_t k = 0; k < kBlock; k += kLanes) {
    F row[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) row[m] = Load(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int n = 0; n < kTileN; ++n) {
      const F weight = Load(w + n * w_stride + k);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) sum[n][m] = Fma(row[m], weight, sum[n][m]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kTileN; ++n) {
    float* to = sums + n * kLanes;
    Store(to, Add(Load(to), AddAcross(sum[n][0], sum[n][1], sum[n][2], sum[n][3])));
  }
}

// Up to 32 rows of the weight in float32, a block of k at a time.
template <class D, Scales kScales>
class Panel {
 public:
  static constexpr int64_t kStride = kBlock + kPadding;

  explicit Panel(const Product& p) : p_(p), values_(New<float>(kPanelRows * kStride)) {
    std::memset(values_.get(), 0, kPanelRows * kStride * sizeof(float));  // a tile may have more rows than there are
    for (int i = 0; i < kPanelRows; ++i) scales_.emplace_back(p);
  }

  // The next rows are [first, first + count).
  void Take(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    for (int64_t r = 0; r < count; ++r) {
      scales_[r].Read(p_, first + r, D::kFactor);
      scales_[r].SpreadOffsets(p_);
    }
  }

  // Dequantizes block b of them. The codes behind are asked for meanwhile: rows lie far apart, and where the next part of
  // each is, a processor does not foresee.
  void Decode(int64_t b) {
    block_ = b;
    const D d(p_);  // here, so that its tables stay in registers
    uint8_t copy[D::kBytes];
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t n = first_ + r;
      const uint8_t* next = p_.codes + n * p_.row_bytes + (b + kAhead) * D::kBytes;
      for (int i = 0; i < D::kBytes; i += 64) __builtin_prefetch(next + i);
      DecodeBlock<D, kScales>(d, BlockOf<D>(p_, n, b, copy), scales_[r].scale(p_) + b * p_.slots,
                              scales_[r].offset() + b * p_.slots, row(r));
    }
  }

  float* row(int64_t r) const { return values_.get() + r * kStride; }

  // sums[i] += x[m ..] . w[n + i] over the block, for kM rows of x.
  template <int kM>
  void Multiply(const Rows& rows, int64_t m, int64_t n, float* sums) const {
    MultiplyTile<kM>(rows.values.get() + m * rows.stride + block_ * kBlock, rows.stride, row(n), kStride, sums);
  }

  // What is to be added to the product of row m of x and row r.
  float Offset(const Rows&, int64_t, int64_t) const { return 0; }

 private:
  const Product& p_;
  const Buffer<float> values_;
  std::vector<RowScales> scales_;
  int64_t first_ = 0, count_ = 0, block_ = 0;
};

template <class P>
static void MultiplyMany(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  P panel(p);
  constexpr int64_t kSums = kPanelRows * kLanes;  // of kTileM rows of x
  const int64_t size = (rows.m + kTileM - 1) / kTileM * kSums;
  const Buffer<float> sums = New<float>(size);
  for (int64_t first = n0; first < n1; first += kPanelRows) {
    const int64_t count = std::min<int64_t>(kPanelRows, n1 - first);
    panel.Take(first, count);
    std::memset(sums.get(), 0, size * sizeof(float));
    for (int64_t b = 0; b < p.blocks; ++b) {
      panel.Decode(b);
      for (int64_t m = 0; m < rows.m; m += kTileM) {
        for (int64_t n = 0; n < count; n += kTileN) {
          float* to = sums.get() + m / kTileM * kSums + n * kLanes;
          switch (rows.m - m) {
            case 1: panel.template Multiply<1>(rows, m, n, to); break;
            case 2: panel.template Multiply<2>(rows, m, n, to); break;
            case 3: panel.template Multiply<3>(rows, m, n, to); break;
            default: panel.template Multiply<kTileM>(rows, m, n, to);
          }
        }
      }
    }
    for (int64_t m = 0; m < rows.m; m += kTileM)
      for (int64_t r = 0; r < count; ++r) {
        float found[kTileM];
        SumFourths(Load(sums.get() + m / kTileM * kSums + r * kLanes), found);
        float* y = p.y + (m0 + m) * p.n + first + r;
        for (int64_t i = 0; i < std::min<int64_t>(kTileM, rows.m - m); ++i)
          y[i * p.n] = found[i] + panel.Offset(rows, m + i, r);
      }
  }
}

#include "kernels_transposed.h"

// ---- which of them ---------------------------------------------------------------------------------------------------

template <class D, Scales kScales>
static void MultiplyScaled(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  if (p.transposed) return MultiplyTransposed<D, kScales>(p, m0, rows, n0, n1);
  switch (rows.tile) {
    case 1: return MultiplyRows<D, kScales, 1>(p, m0, rows, n0, n1);
    case 2: return MultiplyRows<D, kScales, 2>(p, m0, rows, n0, n1);
    case 4: return MultiplyFew<D, kScales, 4>(p, m0, rows, n0, n1);
    case 8: return MultiplyFew<D, kScales, 8>(p, m0, rows, n0, n1);
    default: return MultiplyMany<Panel<D, kScales>>(p, m0, rows, n0, n1);
  }
}

template <class D>
static void MultiplyCodes(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  switch (p.scales) {
    case Scales::kOne: return MultiplyScaled<D, Scales::kOne>(p, m0, rows, n0, n1);
    case Scales::kSixteens: return MultiplyScaled<D, Scales::kSixteens>(p, m0, rows, n0, n1);
    case Scales::kLanes:
      if constexpr (D::kPacked) return MultiplyScaled<D, Scales::kLanes>(p, m0, rows, n0, n1);
  }
}

static void Multiply(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  switch (p.codes_type) {
    case Codes::kInt2: return MultiplyCodes<PackedInt<2>>(p, m0, rows, n0, n1);
    case Codes::kInt3: return MultiplyCodes<PackedInt<3>>(p, m0, rows, n0, n1);
    case Codes::kInt4: return MultiplyCodes<PackedInt4>(p, m0, rows, n0, n1);
    case Codes::kInt5: return MultiplyCodes<PackedInt<5>>(p, m0, rows, n0, n1);
    case Codes::kInt6: return MultiplyCodes<PackedInt<6>>(p, m0, rows, n0, n1);
    case Codes::kTable16: return MultiplyCodes<PackedTable>(p, m0, rows, n0, n1);
    case Codes::kInt8: return MultiplyCodes<Int8>(p, m0, rows, n0, n1);
    case Codes::kE4M3: return MultiplyCodes<E4M3>(p, m0, rows, n0, n1);
    case Codes::kE5M2: return MultiplyCodes<E5M2>(p, m0, rows, n0, n1);
    case Codes::kTable256: return MultiplyCodes<ByteTable>(p, m0, rows, n0, n1);
  }
}
