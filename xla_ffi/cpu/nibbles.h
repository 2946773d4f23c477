// Codes of 4 bits in the words of a file -> words in the packed order; included once for each set of instructions, inside
// its namespace.
//
// A few columns are brought together in the cache first, row by row, whatever their strides. A word of their results is
// then eight nibbles of eight of these rows, and which ones a table says: every order of a file is the same loop, that of
// act-order too.

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Four __attribute__((vector_size(16)));

// Four elements of two vectors of four. Of a vector that is written out by its elements g++ makes scalars.
#if !defined(QJAX_SHUFFLE) && defined(__clang__)
#define QJAX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif !defined(QJAX_SHUFFLE)
#define QJAX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

// Four rows of four words -> their transpose.
QJAX_INLINE void Turn(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Four a, b, c, d;
  std::memcpy(&a, from, 16), std::memcpy(&b, from + from_stride, 16);
  std::memcpy(&c, from + 2 * from_stride, 16), std::memcpy(&d, from + 3 * from_stride, 16);
  const Four low1 = QJAX_SHUFFLE(a, b, 0, 4, 1, 5), low2 = QJAX_SHUFFLE(c, d, 0, 4, 1, 5);
  const Four high1 = QJAX_SHUFFLE(a, b, 2, 6, 3, 7), high2 = QJAX_SHUFFLE(c, d, 2, 6, 3, 7);
  a = QJAX_SHUFFLE(low1, low2, 0, 1, 4, 5), b = QJAX_SHUFFLE(low1, low2, 2, 3, 6, 7);
  c = QJAX_SHUFFLE(high1, high2, 0, 1, 4, 5), d = QJAX_SHUFFLE(high1, high2, 2, 3, 6, 7);
  std::memcpy(to, &a, 16), std::memcpy(to + to_stride, &b, 16);
  std::memcpy(to + 2 * to_stride, &c, 16), std::memcpy(to + 3 * to_stride, &d, 16);
}

// `count` columns from `first`, [w.rows, kColumns]; the rest of a row is left as it is.
static void Gather(const NibbleWords& w, int64_t first, int64_t count, uint32_t* found) {
  const uint32_t* words = w.words + first * w.column_stride;
  int64_t row = 0;
  if (w.column_stride == 1 && count == kColumns)
    for (; row < w.rows; ++row) std::memcpy(found + row * kColumns, words + row * w.row_stride, 4 * kColumns);
  if (w.row_stride == 1 && count == kColumns)
    for (; row + 4 <= w.rows; row += 4)
      for (int i = 0; i < kColumns; i += 4)
        Turn(words + row + i * w.column_stride, w.column_stride, found + row * kColumns + i, kColumns);
  for (; row < w.rows; ++row)
    for (int64_t i = 0; i < count; ++i)
      found[row * kColumns + i] = words[row * w.row_stride + i * w.column_stride];
}

// Word i = 4c + j of a block of each column: its place p = 4l + 2s + h is k = 32j + 16s + 8h + 2c + l.
QJAX_INLINE void PackWord(const uint32_t* columns, const int32_t* nibbles, int i, uint32_t* packed) {
  Words found[kColumns / kLanes] = {};
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const uint32_t nibble = nibbles[32 * (i % 4) + 8 * (p % 4) + 2 * (i / 4) + p / 4];
    const uint32_t* row = columns + nibble / 8 * kColumns;
#pragma GCC unroll 8
    for (int part = 0; part < kColumns / kLanes; ++part) {
      Words words;
      std::memcpy(&words, row + part * kLanes, sizeof words);
      found[part] |= (words >> nibble % 8 * 4 & 15u) << uint32_t(4 * p);
    }
  }
  std::memcpy(packed, found, sizeof found);
}

// Columns from `first` on, kColumns of them or those that are left.
static void PackNibbles(const NibbleWords& w, int64_t first) {
  const Buffer<uint32_t> columns = New<uint32_t>(w.rows * kColumns);
  uint32_t packed[16][kColumns];
  const int64_t stride = w.of_a_column * w.out_stride, count = std::min<int64_t>(kColumns, w.columns - first);
  Gather(w, first, count, columns.get());
  // Block by block: the rows of a column in which one is found are in the cache for all results of the column.
  for (int64_t turn = 0; turn < w.blocks * w.of_a_column; ++turn) {
    const int64_t block = turn / w.of_a_column, row = turn % w.of_a_column;
    const int32_t* nibbles = w.nibbles + (row * w.blocks + block) * kBlock;
    for (int i = 0; i < 16; ++i) PackWord(columns.get(), nibbles, i, packed[i]);
    uint32_t* out = w.out + first * stride + row * w.out_stride + block * 16;
    int64_t column = 0;
    for (; column + 4 <= count; column += 4)
      for (int i = 0; i < 16; i += 4) Turn(&packed[i][column], kColumns, out + column * stride + i, stride);
    for (; column < count; ++column)
      for (int i = 0; i < 16; ++i) out[column * stride + i] = packed[i][column];
  }
}
