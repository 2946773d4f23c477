// Vectors of 4 lanes as g++ and clang++ have them for any machine: SSE2, NEON. Included inside a namespace.
constexpr int kLanes = 4;
constexpr int kTileN = 2;
constexpr bool kTableIsFastest = false;

typedef float F __attribute__((vector_size(16)));
typedef uint32_t I __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));

QJAX_INLINE F Zero() { return F{}; }
QJAX_INLINE F Load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
QJAX_INLINE F LoadOnce(const float* p) { return Load(p); }
QJAX_INLINE void Store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
QJAX_INLINE F Set1(float v) { return F{v, v, v, v}; }
QJAX_INLINE F Repeat4(const float* p) { return Load(p); }
QJAX_INLINE F Fma(F a, F b, F c) { return a * b + c; }
QJAX_INLINE F Mul(F a, F b) { return a * b; }
QJAX_INLINE F Add(F a, F b) { return a + b; }
QJAX_INLINE F Sub(F a, F b) { return a - b; }
QJAX_INLINE F Div(F a, F b) { return a / b; }
QJAX_INLINE F Max(F a, F b) { return a > b ? a : b; }
QJAX_INLINE F Abs(F v) { return (F)((I)v & 0x7fffffffu); }
// To nearest, half to even, within int8.
QJAX_INLINE void StoreRounded(int8_t* p, F v) {
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(std::max(-128.0f, std::min(127.0f, std::nearbyint(v[i]))));
}
QJAX_INLINE float Sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// Lane 4i + j is the sum of lanes 4i to 4i + 3 of the j-th; and the sums of every fourth lane.
QJAX_INLINE F AddAcross(F a, F b, F c, F d) { return F{Sum(a), Sum(b), Sum(c), Sum(d)}; }
QJAX_INLINE void SumFourths(F v, float* out) { Store(out, v); }

QJAX_INLINE I LoadWords(const uint32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
QJAX_INLINE void Keep(I&) {}
QJAX_INLINE I LoadPairs(const uint32_t* p) { return I{p[0], p[0] >> 8, p[1], p[1] >> 8}; }
QJAX_INLINE I LoadQuads(const uint32_t* p) { return I{p[0], p[0] >> 4, p[0] >> 8, p[0] >> 12}; }
QJAX_INLINE I SetAll(uint32_t v) { return I{v, v, v, v}; }
template <int kFirst> QJAX_INLINE F RepeatEveryOther4(const float* p) {
  return F{p[kFirst], p[kFirst + 2], p[kFirst + 4], p[kFirst + 6]};
}
QJAX_INLINE I And(I a, I b) { return a & b; }
QJAX_INLINE I Or(I a, I b) { return a | b; }
QJAX_INLINE I Xor(I a, I b) { return a ^ b; }
template <int kBits> QJAX_INLINE I ShiftLeft(I a) { return a << kBits; }
template <int kBits> QJAX_INLINE I ShiftRight(I a) { return a >> kBits; }
template <int kBits> QJAX_INLINE I ShiftSigned(I a) { return (I)((Signed)a >> kBits); }
QJAX_INLINE I AddWords(I a, I b) { return a + b; }
QJAX_INLINE int32_t SumWords(I a) { return int32_t(a[0] + a[1] + a[2] + a[3]); }
// sums[i] + the four products of unsigned by signed bytes of word i, exactly.
template <int kByte> QJAX_INLINE Signed ProductOfByte(I bytes, I signed_bytes) {
  return (Signed)(bytes >> 8 * kByte & 255) * ((Signed)(signed_bytes << (24 - 8 * kByte)) >> 24);
}
QJAX_INLINE I AddProducts(I sums, I bytes, I signed_bytes) {
  return sums + (I)(ProductOfByte<0>(bytes, signed_bytes) + ProductOfByte<1>(bytes, signed_bytes) +
                    ProductOfByte<2>(bytes, signed_bytes) + ProductOfByte<3>(bytes, signed_bytes));
}
QJAX_INLINE F ToFloat(I a) { return __builtin_convertvector((Signed)a, F); }

using Table16 = const float*;
QJAX_INLINE Table16 MakeTable16(const float* table) { return table; }
template <int kP> QJAX_INLINE F Lookup16(Table16 table, I words) {
  const I index = ShiftRight<4 * kP>(words) & 15;
  return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

QJAX_INLINE F Int8ToFloat(const uint8_t* p) {
  const auto* s = reinterpret_cast<const int8_t*>(p);
  return F{float(s[0]), float(s[1]), float(s[2]), float(s[3])};
}
QJAX_INLINE F Stretch(const float* from, const int32_t* index) {
  return F{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
}
QJAX_INLINE F Lookup256(const float* table, const uint8_t* p) {
  return F{table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
}
QJAX_INLINE float HalfBits(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float value;
  if (exponent == 0) {
    value = fraction * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 255u << 23 : uint32_t(exponent + 112) << 23) | uint32_t(fraction) << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  return half >> 15 ? -value : value;
}
QJAX_INLINE F BFloatToFloat(const uint16_t* p) {
  const I bits = {uint32_t(p[0]) << 16, uint32_t(p[1]) << 16, uint32_t(p[2]) << 16, uint32_t(p[3]) << 16};
  return (F)bits;
}
QJAX_INLINE F HalfToFloat(const uint16_t* p) {
  return F{HalfBits(p[0]), HalfBits(p[1]), HalfBits(p[2]), HalfBits(p[3])};
}

QJAX_INLINE F E8M0ToFloat(const uint8_t* p) {
  const I bytes = {p[0], p[1], p[2], p[3]};
  return (F)(ShiftLeft<23>(bytes) | ((I)((bytes == 0) | (bytes == 255)) & 1u << 22));
}
QJAX_INLINE F E5M2ToFloat(const uint8_t* p) {
  return F{HalfBits(p[0] << 8), HalfBits(p[1] << 8), HalfBits(p[2] << 8), HalfBits(p[3] << 8)};
}
QJAX_INLINE F E4M3ToFloatOver256(const uint8_t* p) {
  float v[4];
  for (int i = 0; i < 4; ++i) v[i] = HalfBits((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
  return Load(v);
}
