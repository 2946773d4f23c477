// The product with the transposed weight, as gradients with respect to x are; a part of kernels.h.
//
//     y[m, k] = sum_n x[m, n] * w[n, k]
//
// As with many rows of x, a panel of 32 rows of the weight by 128 k is dequantized into the cache; then each of its rows,
// x[m, n] times, is added to the rows of y, whose k stay in the order in which codes are decoded until they are written.
// One row of x meets the codes as they are decoded instead. A task owns columns of y and goes through all rows of the
// weight. Every element of y is a chain of sums whose order depends on N and M alone.

// sums[m][k] += sum over `count` rows r of x[m][r] * w[r][k], for a block of k.
template <int kM>
static void AddRows(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count, float* sums,
                    int64_t sums_stride) {
  for (int64_t k = 0; k < kBlock; k += kTileN * kLanes) {
    F sum[kM][kTileN];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < kTileN; ++i) sum[m][i] = Zero();
    for (int64_t r = 0; r < count; ++r) {
      F weight[kTileN];
#pragma GCC unroll 4
      for (int i = 0; i < kTileN; ++i) weight[i] = Load(w + r * w_stride + k + i * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
        const F factor = Set1(x[m * x_stride + r]);
#pragma GCC unroll 4
        for (int i = 0; i < kTileN; ++i) sum[m][i] = Fma(factor, weight[i], sum[m][i]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < kTileN; ++i) {
        float* to = sums + m * sums_stride + k + i * kLanes;
        Store(to, Add(Load(to), sum[m][i]));
      }
  }
}

// A panel of rows after the other is decoded, and added by `AddRows`. x and sums: see MultiplyTransposed.
template <class D, Scales kScales>
static void AddPanels(const Product& p, const Rows& rows, int64_t first_block, int64_t end_block, float* sums,
                      int64_t stride) {
  Panel<D, kScales> panel(p);
  constexpr int64_t kStride = panel.kStride;
  for (int64_t first = 0; first < p.n; first += kPanelRows) {
    const int64_t count = std::min<int64_t>(kPanelRows, p.n - first);
    panel.Take(first, count);
    for (int64_t b = first_block; b < end_block; ++b) {
      panel.Decode(b);
      for (int64_t m = 0; m < rows.m; m += kTileM) {
        const float *x = rows.values.get() + m * rows.stride + first, *w = panel.row(0);
        float* to = sums + m * stride + (b - first_block) * kBlock;
        switch (rows.m - m) {
          case 1: AddRows<1>(x, rows.stride, w, kStride, count, to, stride); break;
          case 2: AddRows<2>(x, rows.stride, w, kStride, count, to, stride); break;
          case 3: AddRows<3>(x, rows.stride, w, kStride, count, to, stride); break;
          default: AddRows<kTileM>(x, rows.stride, w, kStride, count, to, stride);
        }
      }
    }
  }
}

template <class D, Scales kScales, int kP>
QJAX_INLINE void AddStep(const D& d, const typename D::Words& words, F x, const float* scale, const float* offset,
                         F (&sum)[8]) {
  const F weight = Fma(d.template Value<kP>(words), ScaleAt<D, kScales, kP>(scale), ScaleAt<D, kScales, kP>(offset));
  sum[kP] = Fma(x, weight, sum[kP]);
}

// One row of x: the sums of a block stay in registers while codes of 32 rows are decoded and added.
template <class D, Scales kScales>
static void AddCodes(const Product& p, const Rows& rows, int64_t first_block, int64_t end_block, float* sums) {
  const D d(p);
  uint8_t copy[D::kBytes];
  std::vector<RowScales> scales;
  for (int i = 0; i < kPanelRows; ++i) scales.emplace_back(p);
  for (int64_t first = 0; first < p.n; first += kPanelRows) {
    const int64_t count = std::min<int64_t>(kPanelRows, p.n - first);
    const float* x = rows.values.get() + first;
    for (int64_t r = 0; r < count; ++r) scales[r].Read(p, first + r, D::kFactor), scales[r].SpreadOffsets(p);
    for (int64_t b = first_block; b < end_block; ++b)
      for (int part = 0; part < kParts; ++part) {
        float* to = sums + (b - first_block) * kBlock + part * kLanes;
        F sum[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] = Load(to + 16 * i);
        for (int64_t r = 0; r < count; ++r) {
          const uint8_t* block = BlockOf<D>(p, first + r, b, copy);
          for (int at = 0; at < D::kBytes; at += 64) __builtin_prefetch(block + kAhead * D::kBytes + at);
          const auto words = d.Read(block, part);
          const float *scale = scales[r].scale(p) + b * p.slots, *offset = scales[r].offset() + b * p.slots;
          const F by = Set1(x[r]);
          AddStep<D, kScales, 0>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 1>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 2>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 3>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 4>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 5>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 6>(d, words, by, scale, offset, sum);
          AddStep<D, kScales, 7>(d, words, by, scale, offset, sum);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) Store(to + 16 * i, sum[i]);
      }
  }
}

// y[m0 : m0 + rows.m, k0 : k1].
template <class D, Scales kScales>
static void MultiplyTransposed(const Product& p, int64_t m0, const Rows& rows, int64_t k0, int64_t k1) {
  const int64_t first_block = k0 / kBlock, end_block = (k1 + kBlock - 1) / kBlock;
  const int64_t stride = (end_block - first_block) * kBlock + kPadding;
  const Buffer<float> sums = New<float>(rows.m * stride);
  std::memset(sums.get(), 0, rows.m * stride * sizeof(float));
  if (rows.m == 1)
    AddCodes<D, kScales>(p, rows, first_block, end_block, sums.get());
  else
    AddPanels<D, kScales>(p, rows, first_block, end_block, sums.get(), stride);
  for (int64_t m = 0; m < rows.m; ++m) {
    const float* from = sums.get() + m * stride;
    float* y = p.y + (m0 + m) * p.k + k0;
    for (int64_t k = 0; k < k1 - k0; k += kBlock)
      for (int i = 0; i < kBlock; ++i) {
        const int64_t at = k + (D::kPacked ? kPackedPositions[i] : i);
        if (at < k1 - k0) y[at] = from[k + i];
      }
  }
}
