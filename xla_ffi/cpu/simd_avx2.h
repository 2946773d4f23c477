// Vectors of 8 lanes: AVX2, FMA and F16C. Included inside a namespace, compiled for these instructions.
constexpr int kLanes = 8;
constexpr int kTileN = 2;
constexpr bool kTableIsFastest = false;

using F = __m256;
using I = __m256i;

QJAX_INLINE F Zero() { return _mm256_setzero_ps(); }
QJAX_INLINE F Load(const float* p) { return _mm256_loadu_ps(p); }
QJAX_INLINE F LoadOnce(const float* p) {
  F v = Load(p);
  asm("" : "+x"(v));
  return v;
}
QJAX_INLINE void Store(float* p, F v) { _mm256_storeu_ps(p, v); }
QJAX_INLINE F Set1(float v) { return _mm256_set1_ps(v); }
QJAX_INLINE F Repeat4(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
QJAX_INLINE F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
QJAX_INLINE F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
QJAX_INLINE F Add(F a, F b) { return _mm256_add_ps(a, b); }
QJAX_INLINE F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
QJAX_INLINE F Div(F a, F b) { return _mm256_div_ps(a, b); }
QJAX_INLINE F Max(F a, F b) { return _mm256_max_ps(a, b); }
QJAX_INLINE F Abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
// Lane 4i + j is the sum of lanes 4i to 4i + 3 of the j-th; and the sums of every fourth lane.
QJAX_INLINE F AddAcross(F a, F b, F c, F d) { return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d)); }
QJAX_INLINE void SumFourths(F v, float* out) {
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
// To nearest, half to even, within int8.
QJAX_INLINE void StoreRounded(int8_t* p, F v) {
  const __m256i words = _mm256_cvtps_epi32(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
QJAX_INLINE float Sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

QJAX_INLINE I LoadWords(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
QJAX_INLINE void Keep(I& v) { asm("" : "+x"(v)); }
QJAX_INLINE I LoadPairs(const uint32_t* p) {
  const I words = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const I twice = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
  return _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8));
}
QJAX_INLINE I LoadQuads(const uint32_t* p) {
  const I words = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const I four_times = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  return _mm256_srlv_epi32(four_times, _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12));
}
QJAX_INLINE I SetAll(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
template <int kFirst> QJAX_INLINE F RepeatEveryOther4(const float* p) {
  const I index = _mm256_add_epi32(_mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6), SetAll(kFirst));
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
}
QJAX_INLINE I And(I a, I b) { return _mm256_and_si256(a, b); }
QJAX_INLINE I Or(I a, I b) { return _mm256_or_si256(a, b); }
QJAX_INLINE I Xor(I a, I b) { return _mm256_xor_si256(a, b); }
template <int kBits> QJAX_INLINE I ShiftLeft(I a) { return _mm256_slli_epi32(a, kBits); }
template <int kBits> QJAX_INLINE I ShiftRight(I a) { return _mm256_srli_epi32(a, kBits); }
template <int kBits> QJAX_INLINE I ShiftSigned(I a) { return _mm256_srai_epi32(a, kBits); }
QJAX_INLINE I AddWords(I a, I b) { return _mm256_add_epi32(a, b); }
QJAX_INLINE int32_t SumWords(I a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
// sums[i] + the four products of unsigned by signed bytes of word i, exactly.
QJAX_INLINE I AddProducts(I sums, I bytes, I signed_bytes) {
  const I even = _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8), odd = _mm256_srai_epi16(signed_bytes, 8);
  const I products = _mm256_madd_epi16(And(bytes, SetAll(0x00ff00ffu)), even);
  return AddWords(AddWords(sums, products), _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), odd));
}
QJAX_INLINE F ToFloat(I a) { return _mm256_cvtepi32_ps(a); }

struct Table16 {
  F low, high;
};
QJAX_INLINE Table16 MakeTable16(const float* table) { return {Load(table), Load(table + 8)}; }
template <int kP> QJAX_INLINE F Lookup16(Table16 table, I words) {
  const I index = ShiftRight<4 * kP>(words);  // of which a permutation reads three bits
  const F low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(ShiftLeft<28 - 4 * kP>(words)));  // by the fourth
}

QJAX_INLINE __m128i LoadBytes(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
QJAX_INLINE F Int8ToFloat(const uint8_t* p) { return ToFloat(_mm256_cvtepi8_epi32(LoadBytes(p))); }
QJAX_INLINE F Stretch(const float* from, const int32_t* index) {
  const I at = _mm256_loadu_si256(reinterpret_cast<const I*>(index));
  return _mm256_permutevar8x32_ps(Load(from + index[0]), _mm256_sub_epi32(at, _mm256_set1_epi32(index[0])));
}
QJAX_INLINE F Lookup256(const float* table, const uint8_t* p) {
  return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(LoadBytes(p)), 4);
}
QJAX_INLINE F BFloatToFloat(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
QJAX_INLINE F HalfToFloat(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

QJAX_INLINE F E8M0ToFloat(const uint8_t* p) {
  const I bytes = _mm256_cvtepu8_epi32(LoadBytes(p)), nan = _mm256_cmpeq_epi32(bytes, SetAll(255));
  return _mm256_castsi256_ps(Or(_mm256_max_epu32(ShiftLeft<23>(bytes), SetAll(1u << 22)), And(nan, SetAll(1u << 22))));
}
QJAX_INLINE F E5M2ToFloat(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(LoadBytes(p)), 8));
}
QJAX_INLINE F E4M3ToFloatOver256(const uint8_t* p) {
  const __m128i wide = _mm_cvtepi8_epi16(LoadBytes(p));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbf80))));
}
