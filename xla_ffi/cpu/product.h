// One product as the kernels see it, and the table of instruction sets, each of which has the same two functions.
#ifndef QJAX_XLA_FFI_CPU_PRODUCT_H_
#define QJAX_XLA_FFI_CPU_PRODUCT_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace qjax::cpu {

constexpr int64_t kBlock = 128;  // codes along K that are packed together; x is padded to it

constexpr int64_t kFewRows = 8;  // of x: up to so many meet codes as they are decoded

constexpr int64_t kPadding = 64;  // elements between rows in the cache: at powers of two they would push each other out

// The codes' encoding: packed integers of 2 to 6 bits, packed indices of a table, and what has a byte each.
enum class Codes { kInt2, kInt3, kInt4, kInt5, kInt6, kTable16, kInt8, kE4M3, kE5M2, kTable256 };

enum class Number { kF32, kBF16, kF16, kE8M0, kE4M3, kInt8 };

// How scales lie within a block of 128 codes in the kernels' order (see kernels.h): one for all, or for each 32 or 16
// consecutive k. Bytes have no form for 32.
enum class Scales { kOne, kLanes, kSixteens };

struct Array {
  const void* data = nullptr;
  Number type = Number::kF32;
};

struct Product {
  int64_t m, k, n;
  bool transposed;     // y [m, k] = x [m, n] @ w, k up to whole blocks, instead of y [m, n] = x [m, k] @ w^T
  int64_t blocks;      // of 128 along k
  int64_t row_bytes;   // of codes
  Codes codes_type;
  Array x;             // [m, k], or [m, n]
  const uint8_t* codes;
  const float* table;  // 16 or 256 values; null for integers and FP8
  Array scale, zero;   // [ceil(n / block_n), groups]; zero.data may be null
  int64_t groups, group, block_n;
  float middle;        // the zero point of codes as the kernels decode them
  Scales scales;
  int64_t slots;       // scales of a block in the kernels' order
  std::vector<int32_t> slot_group;  // [blocks, slots], padded to 16: the group whose scale is there
  bool slots_are_groups;            // slot_group[i] is i
  float* y;            // [m, n], or [m, k]

  int64_t width() const { return transposed ? k : n; }  // of y
  int64_t depth() const { return transposed ? n : k; }  // of x
};

inline bool IsPacked(Codes type) { return type <= Codes::kTable16; }

// Memory that starts at a cache line and ends with one.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T, Free>;
template <class T>
static Buffer<T> New(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64)));
}

// Rows of x; those along k padded with zeros to whole blocks, in the order in which codes are decoded. Few rows lie block
// by block beside each other, `tile` of them, the last ones zeros; of more each lies in one piece, and `tile` is 0.
struct Rows {
  int64_t m, tile;
  int64_t stride, block_stride;  // from a row to the next, and from a block of it
  Buffer<float> values;          // x as floats
  Buffer<int8_t> codes;          // x as int8
  Buffer<int32_t> corrections, whole_corrections;  // [m, blocks, 16], [m]: with codes, see kernels_int8.h
  Buffer<float> sums;                              // [m, groups]: of x along k over each group; where there are zero points

  // Room for `m` rows.
  Rows(const Product& p, int64_t m) : m(m), tile(TileOf(p, m)) {
    const int64_t padded = (p.depth() + kBlock - 1) / kBlock * kBlock;
    stride = tile > 0 ? kBlock : padded + kPadding;
    block_stride = tile > 0 ? tile * kBlock : kBlock;
    if (p.zero.data != nullptr && !p.transposed) sums = New<float>(m * p.groups);
    if (p.x.type == Number::kInt8) {
      codes = New<int8_t>(m * stride);
      corrections = New<int32_t>(m * p.blocks * 16);
      whole_corrections = New<int32_t>(m);
      return;
    }
    const int64_t size = tile > 0 ? tile * padded : m * stride;
    values = New<float>(size);
    if (tile > m) std::memset(values.get(), 0, size * sizeof(float));
  }

 private:
  static int64_t TileOf(const Product& p, int64_t m) {
    if (p.transposed || p.x.type == Number::kInt8 || m > kFewRows) return 0;
    int64_t tile = 1;
    while (tile < m) tile *= 2;
    return tile;
  }
};

constexpr int kColumns = 32;  // of words, that are packed at a time

// Codes of 4 bits in words that are not in the packed order, and where they go.
struct NibbleWords {
  const uint32_t* words;  // [rows, columns]
  int64_t rows, columns, row_stride, column_stride;
  const int32_t* nibbles;  // [of_a_column, blocks * kBlock]: code k is nibble nibbles[.., k] % 8 of word nibbles[.., k] / 8
  int64_t of_a_column, blocks;
  uint32_t* out;  // [columns * of_a_column, blocks, 16]
  int64_t out_stride;
};

struct Instructions {
  const char* name;
  bool (*available)();
  // Rows [m0, m0 + rows.m) of x; row `i` of them.
  void (*prepare)(const Product& p, int64_t m0, Rows& rows, int64_t i);
  // y[m0 : m0 + rows.m, first : end].
  void (*multiply)(const Product& p, int64_t m0, const Rows& rows, int64_t first, int64_t end);
  // Where x is floats: kColumns columns from `first`; one row of [.., k].
  void (*pack_nibbles)(const NibbleWords& w, int64_t first);
  void (*quantize_row)(const Array& x, int64_t row, int64_t k, int8_t* codes, float* scale);
};

}  // namespace qjax::cpu

#endif  // QJAX_XLA_FFI_CPU_PRODUCT_H_
