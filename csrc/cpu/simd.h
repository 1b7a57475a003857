// The vector operations that differ between instruction sets; arithmetic operators are the compiler's own.
//
// Contraction is off in the build and every fused multiply-add is written as one, so that the same expression has the
// same bits wherever it is inlined. Include nothing with inline functions here or in what includes this: the linker
// keeps one copy of each, perhaps that of a processor this one is not.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#if defined(__AVX512BF16__)
#define FASTPREF_ISA avx512_bf16
#elif defined(__AVX512VNNI__)
#define FASTPREF_ISA avx512_vnni
#elif defined(__AVX512F__)
#define FASTPREF_ISA avx512
#elif defined(__AVXVNNI__)
#define FASTPREF_ISA avx_vnni
#else
#define FASTPREF_ISA avx2
#endif

namespace FASTPREF_ISA {

#if defined(__AVX512F__)

typedef __m512 Vec;
typedef __m512i Words;    // 32-bit lanes
typedef __m256i HalfVec;  // 16-bit lanes
constexpr int LANES = 16;
constexpr int TILE_ROWS = 14, TILE_VECS = 2;  // 28 of 32 registers accumulate

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
static inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec max_or_second_if_nan(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline bool any_not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0; }
static inline Vec copy_sign(Vec magnitude, Vec sign) {
  // 0xe4: bits of `sign` where the mask is set, of `magnitude` elsewhere.
  const __m512i mask = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(sign), _mm512_castps_si512(magnitude), mask, 0xe4));
}
static inline Vec shift_into_exponent(Vec a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
}
static inline HalfVec load_half(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline Vec widen_bf16(HalfVec a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
static inline Vec widen_fp16(HalfVec a) { return _mm512_cvtph_ps(a); }
// The first, and the second, half of a0 b0 a1 b1 ...
static inline Vec interleave_low(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_ps(a, from, b);
}
static inline Vec interleave_high(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return _mm512_permutex2var_ps(a, from, b);
}
static inline Vec max_keeping_nan(Vec a, Vec b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
static inline Words bits(Vec a) { return _mm512_castps_si512(a); }
static inline Vec of_bits(Words a) { return _mm512_castsi512_ps(a); }
static inline Words broadcast_word(int32_t a) { return _mm512_set1_epi32(a); }
static inline Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
static inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
static inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
static inline Words low_byte(Words a, int shift) {
  return _mm512_slli_epi32(_mm512_and_si512(a, _mm512_set1_epi32(0xff)), static_cast<unsigned>(shift));
}
static inline Vec to_float(Words a) { return _mm512_cvtepi32_ps(a); }
static inline Words to_nearest(Vec a) { return _mm512_cvtps_epi32(a); }  // ties to even
// sum + u0 s0 + u1 s1 + u2 s2 + u3 s3 in each lane, bytes of u unsigned, those of s signed.
static inline Words dot_bytes(Words sum, Words u, Words s) {
#if defined(__AVX512VNNI__)
  // Not the intrinsic: GCC 12 copies and spills what it accumulates.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
#else
  const Words even = _mm512_set1_epi32(0x00ff00ff);
  const Words low = _mm512_madd_epi16(_mm512_and_si512(u, even), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  const Words high = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
#endif
}

#else

typedef __m256 Vec;
typedef __m256i Words;
typedef __m128i HalfVec;
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6, TILE_VECS = 2;  // 12 of 16 registers accumulate

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
static inline Vec broadcast(float a) { return _mm256_set1_ps(a); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec max_or_second_if_nan(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline bool any_not_le(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0; }
static inline Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec mask = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(mask, magnitude), _mm256_and_ps(mask, sign));
}
static inline Vec shift_into_exponent(Vec a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
static inline HalfVec load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline Vec widen_bf16(HalfVec a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
static inline Vec widen_fp16(HalfVec a) { return _mm256_cvtph_ps(a); }
static inline Vec interleave_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
static inline Vec interleave_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
static inline Vec max_keeping_nan(Vec a, Vec b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
static inline Words bits(Vec a) { return _mm256_castps_si256(a); }
static inline Vec of_bits(Words a) { return _mm256_castsi256_ps(a); }
static inline Words broadcast_word(int32_t a) { return _mm256_set1_epi32(a); }
static inline Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
static inline Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
static inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
static inline Words low_byte(Words a, int shift) {
  return _mm256_slli_epi32(_mm256_and_si256(a, _mm256_set1_epi32(0xff)), shift);
}
static inline Vec to_float(Words a) { return _mm256_cvtepi32_ps(a); }
static inline Words to_nearest(Vec a) { return _mm256_cvtps_epi32(a); }
static inline Words dot_bytes(Words sum, Words u, Words s) {
#if defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(s));
  return sum;
#else
  const Words even = _mm256_set1_epi32(0x00ff00ff);
  const Words low = _mm256_madd_epi16(_mm256_and_si256(u, even), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const Words high = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
#endif
}

#endif

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
// c + a0 b0 + a1 b1 in fp32, each lane of a and b two bf16 numbers.
static inline Vec dot_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
static inline Vec bitwise_or(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#else
constexpr bool HAS_PAIRS = false;
static inline Vec dot_pairs(Vec, Vec, Vec c) { return c; }
static inline Vec bitwise_or(Vec a, Vec) { return a; }
#endif

constexpr int TILE_COLUMNS = TILE_VECS * LANES;

constexpr float LOG2E = 1.44269504088896341f;
// ln 2 in two parts: a multiple of HIGH up to 2^9 is exact.
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
// Added to a small number it rounds it to an integer, kept in the low bits together with the exponent's bias.
constexpr float ROUND_AND_BIAS = 12582912.0f + 127.0f;
// exp is still a normal number here; below it counts as 0.
constexpr float LOWEST_EXPONENT = -87.0f;

// e^x for x <= 88, to 1.0 units in the last place and exactly 1 at 0; 0 below LOWEST_EXPONENT; NaN for NaN and +inf.
static inline Vec exp(Vec x) {
  const Vec shifted = fma(x, broadcast(LOG2E), broadcast(ROUND_AND_BIAS)), n = shifted - broadcast(ROUND_AND_BIAS);
  const Vec r = fma(n, broadcast(-LN2_LOW), fma(n, broadcast(-LN2_HIGH), x)), one = broadcast(1.0f);
  // Taylor to r^7, |r| <= ln 2 / 2: truncated at 2^-27.
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(fma(p, r, one), r, one);
  return x < broadcast(LOWEST_EXPONENT) ? broadcast(0.0f) : p * shift_into_exponent(shifted);
}

static inline Vec tanh(Vec x) {
  const Vec one = broadcast(1.0f), two = broadcast(2.0f), magnitude = copy_sign(x, one);
  // Where it is nearly linear, x + x^3 p(x^2): p has the smallest relative error of its degree up to 0.6, 2^-28.
  const Vec square = x * x;
  Vec p = broadcast(-0.005895155481994152f);
  p = fma(p, square, broadcast(0.020795969292521477f));
  p = fma(p, square, broadcast(-0.053783830255270004f));
  p = fma(p, square, broadcast(0.13331924378871918f));
  p = fma(p, square, broadcast(-0.33333298563957214f));
  const Vec small = fma(p * square, x, x);
  // Elsewhere 1 - 2 e / (1 + e) with e = e^(-2|x|): the errors of e count half at most.
  const Vec e = exp(magnitude * broadcast(-2.0f)), large = copy_sign(one - two * e / (one + e), x);
  return magnitude < broadcast(0.6f) ? small : large;
}

// In lane order, in fp64.
static inline double sum_lanes(Vec a) {
  float lanes[LANES];
  store(lanes, a);
  double sum = 0.0;
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  return sum;
}

}  // namespace FASTPREF_ISA
