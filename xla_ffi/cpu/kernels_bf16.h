// More than eight rows of bfloat16 x by codes that bfloat16 has exactly, integers, FP8 and FP4, with scales for 32 k and
// more (of bytes 128): products of pairs, which AVX512-BF16 has twice as many of in an instruction. Included inside a
// namespace that sees the AVX-512 kernels.
//
// The order of k is theirs. Two steps of sixteen codes are one vector of sixteen pairs, a lane's two codes in its own; x
// lies in the same order. So a lane's sum belongs to one group of 32 k, as it does there. Codes are not scaled: a block's
// sums are, in float32, and zero points come at the end, times sums of x over groups.
//
// The instruction reads subnormal numbers as zeros, and adds two exact products to a float32 sum.

static QJAX_INLINE __m512bh LoadHalves(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

// 16 pairs of floats that are halves.
static QJAX_INLINE void StorePairs(uint16_t* p, F first, F second) {
  const I low = ShiftRight<16>(_mm512_castps_si512(first)), high = And(_mm512_castps_si512(second), SetAll(0xffff0000u));
  _mm512_storeu_si512(p, Or(low, high));
}

static bool InHalves(const Product& p, const Rows& rows) {
  if (p.x.type != Number::kBF16 || p.transposed || rows.tile != 0) return false;
  if (p.scales == Scales::kLanes ? !IsPacked(p.codes_type) : p.scales != Scales::kOne) return false;
  if (p.codes_type == Codes::kTable256) return false;
  for (int i = 0; p.codes_type == Codes::kTable16 && i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p.table + i, sizeof bits);
    if (bits & 0xffff) return false;
  }
  return true;
}

// As the others, and the row is then narrowed where it lies: what is written ends before what is read next.
static void Prepare(const Product& p, int64_t m0, Rows& rows, int64_t i) {
  avx512::Prepare(p, m0, rows, i);
  if (!InHalves(p, rows)) return;
  float* row = rows.values.get() + i * rows.stride;
  for (int64_t k = 0; k < p.blocks * kBlock; k += 2 * kLanes)
    StorePairs(reinterpret_cast<uint16_t*>(row) + k, Load(row + k), Load(row + k + kLanes));
}

// Up to 32 rows of the weight as halves, a block of k at a time.
template <class D, Scales kScales>
class HalfPanel {
 public:
  static constexpr int64_t kStride = kBlock + kPadding / 2;

  explicit HalfPanel(const Product& p) : p_(p), values_(New<uint16_t>(kPanelRows * kStride)) {
    for (int i = 0; i < kPanelRows; ++i) scales_.emplace_back(p);
    std::memset(values_.get(), 0, kPanelRows * kStride * sizeof(uint16_t));
    std::memset(block_scales_, 0, sizeof block_scales_);
  }

  void Take(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    for (int64_t r = 0; r < count; ++r) scales_[r].Read(p_, first + r, D::kFactor);
  }

  void Decode(int64_t b) {
    block_ = b;
    const D d(p_);
    uint8_t copy[D::kBytes];
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t n = first_ + r;
      const uint8_t* next = p_.codes + n * p_.row_bytes + (b + kAhead) * D::kBytes;
      for (int i = 0; i < D::kBytes; i += 64) __builtin_prefetch(next + i);
      const auto words = d.Read(BlockOf<D>(p_, n, b, copy), 0);
      uint16_t* out = values_.get() + r * kStride;
      StorePairs(out, d.template Value<0>(words), d.template Value<1>(words));
      StorePairs(out + 32, d.template Value<2>(words), d.template Value<3>(words));
      StorePairs(out + 64, d.template Value<4>(words), d.template Value<5>(words));
      StorePairs(out + 96, d.template Value<6>(words), d.template Value<7>(words));
      std::memcpy(block_scales_[r], scales_[r].scale(p_) + b * kSlots, kSlots * sizeof(float));
    }
  }

  // As MultiplyTile, of rows m of x and n of the panel.
  template <int kM>
  void Multiply(const Rows& rows, int64_t m, int64_t n, float* sums) const {
    const int64_t x_stride = 2 * rows.stride;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(rows.values.get()) + m * x_stride + block_ * kBlock;
    const uint16_t* w = values_.get() + n * kStride;
    F sum[kTileN][kTileM];
#pragma GCC unroll 4
    for (int i = 0; i < kTileN; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTileM; ++j) sum[i][j] = Zero();
#pragma GCC unroll 4
    for (int64_t k = 0; k < kBlock; k += 2 * kLanes) {
      __m512bh row[kM];
#pragma GCC unroll 4
      for (int j = 0; j < kM; ++j) row[j] = LoadHalves(x + j * x_stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < kTileN; ++i) {
        const __m512bh weight = LoadHalves(w + i * kStride + k);
#pragma GCC unroll 4
        for (int j = 0; j < kM; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row[j], weight);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTileN; ++i) {
      const float* scales = block_scales_[n + i];
      float* to = sums + i * kLanes;
      if constexpr (kScales == Scales::kOne) {
        Store(to, Fma(AddAcross(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), Set1(scales[0]), Load(to)));
      } else {
        const F by = Repeat4(scales);
        const F all = AddAcross(Mul(sum[i][0], by), Mul(sum[i][1], by), Mul(sum[i][2], by), Mul(sum[i][3], by));
        Store(to, Add(all, Load(to)));
      }
    }
  }

  // What zero points add to row m of x times row r.
  float Offset(const Rows& rows, int64_t m, int64_t r) const {
    return p_.zero.data == nullptr ? 0 : scales_[r].DotOffsets(p_, rows.sums.get() + m * p_.groups);
  }

 private:
  static constexpr int64_t kSlots = kScales == Scales::kOne ? 1 : 4;

  const Product& p_;
  const Buffer<uint16_t> values_;
  std::vector<RowScales> scales_;
  float block_scales_[kPanelRows][kSlots];
  int64_t first_ = 0, count_ = 0, block_ = 0;
};

template <class D>
static void MultiplyHalves(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  if constexpr (D::kPacked)
    if (p.scales == Scales::kLanes) return MultiplyMany<HalfPanel<D, Scales::kLanes>>(p, m0, rows, n0, n1);
  return MultiplyMany<HalfPanel<D, Scales::kOne>>(p, m0, rows, n0, n1);
}

static void Multiply(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  if (!InHalves(p, rows)) return avx512::Multiply(p, m0, rows, n0, n1);
  switch (p.codes_type) {
    case Codes::kInt2: return MultiplyHalves<PackedInt<2>>(p, m0, rows, n0, n1);
    case Codes::kInt3: return MultiplyHalves<PackedInt<3>>(p, m0, rows, n0, n1);
    case Codes::kInt5: return MultiplyHalves<PackedInt<5>>(p, m0, rows, n0, n1);
    case Codes::kInt6: return MultiplyHalves<PackedInt<6>>(p, m0, rows, n0, n1);
    case Codes::kInt8: return MultiplyHalves<Int8>(p, m0, rows, n0, n1);
    case Codes::kE4M3: return MultiplyHalves<E4M3>(p, m0, rows, n0, n1);
    case Codes::kE5M2: return MultiplyHalves<E5M2>(p, m0, rows, n0, n1);
    default: return MultiplyHalves<PackedTable>(p, m0, rows, n0, n1);  // of int4, too
  }
}
