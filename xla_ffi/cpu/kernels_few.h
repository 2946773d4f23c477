// Few rows of x, for one instruction set: codes go from registers into the sums; a part of kernels.h.
//
// One and two rows (`MultiplyRow`): a row of the weight is read from end to end, as fast as memory gives it. Up to eight
// (`MultiplyPart`): a decoded vector is scaled and meets all rows of x, which lie block by block beside each other;
// sixteen rows of the weight pass 512 k at a time, so that x stays in the first level of the cache. Zero points cost a
// product over groups: - zero * scale * (sum of x over the group).

constexpr int kRowsOfWeight = 16;  // that meet a part of x while it is in the cache
constexpr int kPartBlocks = 4;     // along k

// Whether the sums of a block are scaled instead of each value: for one row, and where values are had for little.
template <class D, Scales kScales, int kRows>
constexpr bool kScaledOnce = D::kPacked ? kRows == 1 : kScales != Scales::kSixteens;

template <class D, Scales kScales, int kRows, int kP>
QJAX_INLINE void MultiplyStep(const D& d, const typename D::Words& words, const float* x, const float* scale,
                              F (&sum)[kRows][2]) {
  constexpr int kWhich = kScales == Scales::kSixteens ? kP / 2 % 2 : kP % 2;  // which have scales in common
  F value = d.template Value<kP>(words);
  if constexpr (!kScaledOnce<D, kScales, kRows>) value = Mul(value, ScaleAt<D, kScales, kP>(scale));
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) sum[m][kWhich] = Fma(value, Load(x + m * kBlock + 16 * kP), sum[m][kWhich]);
}

// y[0 : kRows, n], without what zero points add.
template <class D, Scales kScales, int kRows>
static void MultiplyRow(const Product& p, const D& d, const float* x, int64_t n, const float* scale, float* y) {
  uint8_t copy[D::kBytes];
  F total[kRows][2];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) total[m][0] = total[m][1] = Zero();
  for (int64_t b = 0; b < p.blocks; ++b, x += kRows * kBlock, scale += p.slots) {
    const uint8_t* block = BlockOf<D>(p, n, b, copy);
    AskAhead<D>(block);
    F own[kRows][2];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) own[m][0] = own[m][1] = Zero();
    auto& sum = kScaledOnce<D, kScales, kRows> ? own : total;
    for (int part = 0; part < kParts; ++part) {
      auto words = d.Read(block, part);
      D::KeepWords(words);
      const float* at = x + part * kLanes;
      MultiplyStep<D, kScales, kRows, 0>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 1>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 2>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 3>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 4>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 5>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 6>(d, words, at, scale, sum);
      MultiplyStep<D, kScales, kRows, 7>(d, words, at, scale, sum);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      if constexpr (!kScaledOnce<D, kScales, kRows>) continue;
      if constexpr (kScales != Scales::kSixteens) {
        total[m][0] = Fma(Add(own[m][0], own[m][1]), ScaleAt<D, kScales, 0>(scale), total[m][0]);
      } else {
        total[m][0] = Fma(own[m][0], ScaleAt<D, kScales, 0>(scale), total[m][0]);
        total[m][1] = Fma(own[m][1], ScaleAt<D, kScales, 2>(scale), total[m][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) y[m * p.n + n] = Sum(Add(total[m][0], total[m][1]));
}

template <class D, Scales kScales, int kRows>
static void MultiplyRows(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  const D d(p);
  RowScales scales(p);
  float* y = p.y + m0 * p.n;
  for (int64_t n = n0; n < n1; ++n) {
    scales.Read(p, n, D::kFactor);
    MultiplyRow<D, kScales, kRows>(p, d, rows.values.get(), n, scales.scale(p), y);
    if (p.zero.data == nullptr) continue;
    for (int64_t m = 0; m < kRows; ++m) y[m * p.n + n] += scales.DotOffsets(p, rows.sums.get() + m * p.groups);
  }
}

template <class D, Scales kScales, int kM, int kN, int kP>
QJAX_INLINE void MultiplyStepOf(const D& d, const typename D::Words (&words)[kN], const float* x,
                                const float* const (&scale)[kN], F (&sum)[kN][kM]) {
  F value[kN];
#pragma GCC unroll 8
  for (int i = 0; i < kN; ++i) value[i] = Mul(d.template Value<kP>(words[i]), ScaleAt<D, kScales, kP>(scale[i]));
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    const F at = LoadOnce(x + m * kBlock + 16 * kP);
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) sum[i][m] = Fma(value[i], at, sum[i][m]);
  }
}

// sums[i][m] += x[m] . w[n + i] over blocks [b0, b1), each sum a vector of lanes; x is that of block b0. Of kN rows of the
// weight there are `count`, and the last one is taken again for those that are not.
template <class D, Scales kScales, int kM, int kN>
static void MultiplyPart(const Product& p, const D& d, const float* x, int64_t n, int64_t count, int64_t b0, int64_t b1,
                         const RowScales* scales, float* sums) {
  uint8_t copy[kN][D::kBytes];
  F sum[kN][kM];
#pragma GCC unroll 8
  for (int i = 0; i < kN; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) sum[i][m] = Load(sums + (i * kM + m) * kLanes);
  for (int64_t b = b0; b < b1; ++b, x += kM * kBlock) {
    const uint8_t* block[kN];
    const float* scale[kN];
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
      const int64_t r = std::min<int64_t>(i, count - 1);
      block[i] = BlockOf<D>(p, n + r, b, copy[i]);
      scale[i] = scales[r].scale(p) + b * p.slots;
      for (int at = 0; at < D::kBytes; at += 64) __builtin_prefetch(block[i] + kPartBlocks * D::kBytes + at);
    }
    for (int part = 0; part < kParts; ++part) {
      typename D::Words words[kN];
#pragma GCC unroll 8
      for (int i = 0; i < kN; ++i) words[i] = d.Read(block[i], part);
      const float* at = x + part * kLanes;
      MultiplyStepOf<D, kScales, kM, kN, 0>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 1>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 2>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 3>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 4>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 5>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 6>(d, words, at, scale, sum);
      MultiplyStepOf<D, kScales, kM, kN, 7>(d, words, at, scale, sum);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kN; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) Store(sums + (i * kM + m) * kLanes, sum[i][m]);
}

template <class D, Scales kScales, int kM>
static void MultiplyFew(const Product& p, int64_t m0, const Rows& rows, int64_t n0, int64_t n1) {
  constexpr int kN = kTileM * kTileN / kM;  // as many sums in registers as in the tiles of more rows
  const D d(p);
  std::vector<RowScales> scales;
  for (int i = 0; i < kRowsOfWeight; ++i) scales.emplace_back(p);
  const Buffer<float> sums = New<float>(kRowsOfWeight * kM * kLanes);
  for (int64_t first = n0; first < n1; first += kRowsOfWeight) {
    const int64_t count = std::min<int64_t>(kRowsOfWeight, n1 - first);
    for (int64_t r = 0; r < count; ++r) scales[r].Read(p, first + r, D::kFactor);
    std::memset(sums.get(), 0, kRowsOfWeight * kM * kLanes * sizeof(float));
    for (int64_t b = 0; b < p.blocks; b += kPartBlocks) {
      const int64_t end = std::min<int64_t>(p.blocks, b + kPartBlocks);
      const float* x = rows.values.get() + b * kM * kBlock;
      for (int64_t r = 0; r < count; r += kN)
        MultiplyPart<D, kScales, kM, kN>(p, d, x, first + r, count - r, b, end, &scales[r],
                                         sums.get() + r * kM * kLanes);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t m = 0; m < rows.m; ++m) {
        const float offset = p.zero.data == nullptr ? 0 : scales[r].DotOffsets(p, rows.sums.get() + m * p.groups);
        p.y[(m0 + m) * p.n + first + r] = Sum(Load(sums.get() + (r * kM + m) * kLanes)) + offset;
      }
  }
}
