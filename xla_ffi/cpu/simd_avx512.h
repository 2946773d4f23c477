// Vectors of 16 lanes: AVX-512 F and BW. Included inside a namespace, compiled for these instructions.
constexpr int kLanes = 16;
constexpr int kTileN = 4;  // columns of y that a tile holds in registers
constexpr bool kTableIsFastest = true;  // of 16 entries: one permutation, against two shifts and a conversion

using F = __m512;
using I = __m512i;

QJAX_INLINE F Zero() { return _mm512_setzero_ps(); }
QJAX_INLINE F Load(const float* p) { return _mm512_loadu_ps(p); }
// To a register: compilers make what is used twice an operand in memory of both, and loads are what there is least of.
QJAX_INLINE F LoadOnce(const float* p) {
  F v = Load(p);
  asm("" : "+v"(v));
  return v;
}
QJAX_INLINE void Store(float* p, F v) { _mm512_storeu_ps(p, v); }
QJAX_INLINE F Set1(float v) { return _mm512_set1_ps(v); }
QJAX_INLINE F Repeat4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
QJAX_INLINE F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
QJAX_INLINE F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
QJAX_INLINE F Add(F a, F b) { return _mm512_add_ps(a, b); }
QJAX_INLINE F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
QJAX_INLINE F Div(F a, F b) { return _mm512_div_ps(a, b); }
QJAX_INLINE F Max(F a, F b) { return _mm512_max_ps(a, b); }
QJAX_INLINE F Abs(F v) { return _mm512_abs_ps(v); }
QJAX_INLINE float Sum(F v) { return _mm512_reduce_add_ps(v); }
// Lane 4i + j is the sum of lanes 4i to 4i + 3 of the j-th; and the sums of every fourth lane.
QJAX_INLINE F AddAcross(F a, F b, F c, F d) {
  const F ab = Add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each four lanes
  const F cd = Add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return Add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}
QJAX_INLINE void SumFourths(F v, float* out) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// To nearest, half to even, within int8.
QJAX_INLINE void StoreRounded(int8_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

QJAX_INLINE I LoadWords(const uint32_t* p) { return _mm512_loadu_si512(p); }
// In a register, as LoadOnce.
QJAX_INLINE void Keep(I& v) { asm("" : "+v"(v)); }
// Words of a plane of 2 bits (1 bit), each for two (four) lanes, its lane's codes shifted to the front.
QJAX_INLINE I LoadPairs(const uint32_t* p) {
  const I twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const I shift = _mm512_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8);
  const I words = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(twice, words), shift);
}
QJAX_INLINE I LoadQuads(const uint32_t* p) {
  const I four_times = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const I shift = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  const I words = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(four_times, words), shift);
}
QJAX_INLINE I SetAll(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
template <int kFirst> QJAX_INLINE F RepeatEveryOther4(const float* p) {
  const I index = _mm512_add_epi32(_mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6), SetAll(kFirst));
  return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
QJAX_INLINE I And(I a, I b) { return _mm512_and_si512(a, b); }
QJAX_INLINE I Or(I a, I b) { return _mm512_or_si512(a, b); }
QJAX_INLINE I Xor(I a, I b) { return _mm512_xor_si512(a, b); }
template <int kBits> QJAX_INLINE I ShiftLeft(I a) { return _mm512_slli_epi32(a, kBits); }
template <int kBits> QJAX_INLINE I ShiftRight(I a) { return _mm512_srli_epi32(a, kBits); }
template <int kBits> QJAX_INLINE I ShiftSigned(I a) { return _mm512_srai_epi32(a, kBits); }
QJAX_INLINE I AddWords(I a, I b) { return _mm512_add_epi32(a, b); }
QJAX_INLINE int32_t SumWords(I a) { return _mm512_reduce_add_epi32(a); }
// sums[i] + the four products of unsigned by signed bytes of word i, exactly.
QJAX_INLINE I AddProducts(I sums, I bytes, I signed_bytes) {
#if QJAX_VNNI
  return _mm512_dpbusd_epi32(sums, bytes, signed_bytes);
#else
  const I even = _mm512_srai_epi16(_mm512_slli_epi16(signed_bytes, 8), 8), odd = _mm512_srai_epi16(signed_bytes, 8);
  const I products = _mm512_madd_epi16(And(bytes, SetAll(0x00ff00ffu)), even);
  return AddWords(AddWords(sums, products), _mm512_madd_epi16(_mm512_srli_epi16(bytes, 8), odd));
#endif
}
QJAX_INLINE F ToFloat(I a) { return _mm512_cvtepi32_ps(a); }

using Table16 = F;
QJAX_INLINE Table16 MakeTable16(const float* table) { return Load(table); }
// Entries at the kP-th nibbles; a permutation reads the low four bits of an index alone.
template <int kP> QJAX_INLINE F Lookup16(Table16 table, I words) {
  return _mm512_permutexvar_ps(ShiftRight<4 * kP>(words), table);
}

QJAX_INLINE __m128i LoadBytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
QJAX_INLINE F Int8ToFloat(const uint8_t* p) { return ToFloat(_mm512_cvtepi8_epi32(LoadBytes(p))); }
// from[index[i]], where no index is more than 1 above the one before; reads kLanes numbers from the first.
QJAX_INLINE F Stretch(const float* from, const int32_t* index) {
  const I within = _mm512_sub_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(index[0]));
  return _mm512_permutexvar_ps(within, Load(from + index[0]));
}
QJAX_INLINE F Lookup256(const float* table, const uint8_t* p) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(LoadBytes(p)), table, 4);
}
QJAX_INLINE F BFloatToFloat(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
QJAX_INLINE F HalfToFloat(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// 2^(byte - 127), which is a subnormal where the byte is 0; 255 is NaN.
QJAX_INLINE F E8M0ToFloat(const uint8_t* p) {
  const I bytes = _mm512_cvtepu8_epi32(LoadBytes(p)), bits = _mm512_max_epu32(ShiftLeft<23>(bytes), SetAll(1u << 22));
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, _mm512_cmpeq_epi32_mask(bytes, SetAll(255)), bits, SetAll(1u << 22)));
}

// FP8 through float16, whose subnormals are converted exactly whatever the flags of the thread: e5m2 is its upper byte,
// e4m3 has the same fields one bit lower and an exponent that is 8 less.
QJAX_INLINE F E5M2ToFloat(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(LoadBytes(p)), 8));
}
QJAX_INLINE F E4M3ToFloatOver256(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(LoadBytes(p));  // the sign is in the upper bits
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbf80))));
}
