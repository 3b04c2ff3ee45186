// 16 lanes as two AVX2 registers, with FMA and F16C. See simd_avx512.h for why everything is in an anonymous namespace.
//
// Without VNNI the int8 products go through vpmaddubsw, which saturates at 16 bits: unsigned quants of up to
// 6 bits stay below it (63 * 127 * 2 = 16,002); 8-bit quants are made signed again and multiplied as
// |w| * sign(a, w), at most 128 * 127 * 2 = 32,512.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace sterna {
namespace {

constexpr int kMaxGroup = 4;     // 16 registers: 4 rows x 2 halves of 16-bit sums, the rest for weights
constexpr bool kSigned8 = true;  // block_dot<8> multiplies signed values: no offset to take back
constexpr int kAttnRows = 2;     // 2 rows x 2 blocks x 2 halves are 8 accumulators
constexpr int kAttnBlocks = 2;
constexpr int kAttnVectors = 2;

struct VF { __m256 lo, hi; };
struct VI { __m256i lo, hi; };

inline VF vf_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline VF vf_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline VF vf_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline VF vf_load_n(const float* p, int n) {
  float t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return vf_load(t);
}
inline void vf_store(float* p, VF a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
inline VF vf_load_f16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
inline __m256 bf16_half(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline VF vf_load_bf16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return {bf16_half(_mm_loadu_si128(h)), bf16_half(_mm_loadu_si128(h + 1))};
}
inline void vf_store_f16(uint16_t* p, VF a) {
  __m128i* h = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(h, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(h + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline VF operator+(VF a, VF b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline VF operator/(VF a, VF b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline VF vf_fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline VF vf_max(VF a, VF b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline VF vf_min(VF a, VF b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline VF vf_abs(VF a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline VF vf_round(VF a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 pow2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline VF vf_pow2(VF n) { return {pow2_half(n.lo), pow2_half(n.hi)}; }
// p * 2^n for n in [-127, 127]; 2^-127 becomes 0
inline VF vf_ldexp(VF p, VF n) { return p * vf_pow2(n); }
inline VF vf_first(int n, VF a, float rest) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 r = _mm256_set1_ps(rest);
  return {_mm256_blendv_ps(r, a.lo, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))),
          _mm256_blendv_ps(r, a.hi, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)))};
}
inline VF vf_zero_below(VF x, float limit, VF value) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ), value.hi)};
}
inline float vf_sum(VF a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float vf_hmax(VF a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

inline VI vi_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline VI vi_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int N>
inline VI vi_shl(VI a) { return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)}; }
inline VI operator+(VI a, VI b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline void vi_hide(VI& a) { asm volatile("" : "+m"(a)); }  // its value, from the compiler; registers have no room
// 64 products, unsigned w times signed x, in sums of 16 bits: as the kernels do between two widenings.
inline VI vi_dot(VI acc, VI w, VI x) {
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, x.lo)),
          _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, x.hi))};
}
inline VF vf_from(VI a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline VI vi_round(VF a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline int32_t vi_sum(VI a) {
  const __m256i s = _mm256_add_epi32(a.lo, a.hi);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline VI vi_load(const int16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline VI vi_dot16(VI sum, VI a, VI b) {
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b.lo)), _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
inline void vi_store_i16(int16_t* p, VI a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline void vi_store_i8(int8_t* p, VI a) {
  int32_t t[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(t), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(t + 8), a.hi);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(t[i]);
}
inline VF vf_load_u8(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}
inline VF vf_load_i8(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}

template <int BITS>
inline __m256i unpack_half(const uint8_t* q, int g) {
  const __m256i low4 = _mm256_set1_epi8(0x0f);
  auto load = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 64 * i)); };
  if constexpr (BITS == 8) return load(g);
  if constexpr (BITS == 2) return _mm256_and_si256(_mm256_srli_epi16(load(g / 4), 2 * (g % 4)), _mm256_set1_epi8(3));
  const __m256i w = _mm256_and_si256(_mm256_srli_epi16(load(g / 2), 4 * (g % 2)), low4);
  if constexpr (BITS == 5) {
    const __m256i high = load(4);
    const __m256i moved = g <= 4 ? _mm256_slli_epi16(high, 4 - g) : _mm256_srli_epi16(high, g - 4);
    return _mm256_or_si256(w, _mm256_and_si256(moved, _mm256_set1_epi8(0x10)));
  }
  if constexpr (BITS == 6) {
    const __m256i high = load(4 + g / 4);
    const int s = 2 * (g % 4);
    const __m256i moved = s <= 4 ? _mm256_slli_epi16(high, 4 - s) : _mm256_srli_epi16(high, s - 4);
    return _mm256_or_si256(w, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)));
  }
  return w;
}

// How many products of two vpmaddubsw pairs fit 16 bits before they must be widened.
template <int BITS>
constexpr int kWiden = BITS == 2 ? 8 : BITS == 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;

// Sums are added in the order that is written: gcc reassociates them and keeps all products of a block on the stack, which
// made four rows together take longer, each, than one alone.
#define STERNA_IN_ORDER(a, b) asm volatile("" : "+x"(a), "+x"(b))

// Both halves of the 16 lanes advance together, so that an activation is broadcast once.
template <int BITS, int G0, int G1, int MR>
inline void block_dot(const uint8_t* q, const ActBlock* a, VI* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  constexpr int W = kWiden<BITS>;
#pragma GCC unroll 8
  for (int g0 = G0; g0 < G1; g0 += W) {
    __m256i lo[MR], hi[MR];
    constexpr int N = (G1 - G0) < W ? (G1 - G0) : W;
#pragma GCC unroll 8
    for (int g = g0; g < g0 + N; ++g) {
      __m256i w_lo = unpack_half<BITS>(q, g), w_hi = unpack_half<BITS>(q + 32, g);
      __m256i magnitude_lo = w_lo, magnitude_hi = w_hi;
      if constexpr (BITS == 8) {
        w_lo = _mm256_xor_si256(w_lo, _mm256_set1_epi8(-128));  // back to signed
        w_hi = _mm256_xor_si256(w_hi, _mm256_set1_epi8(-128));
        magnitude_lo = _mm256_abs_epi8(w_lo);
        magnitude_hi = _mm256_abs_epi8(w_hi);
      }
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
        int32_t four;
        __builtin_memcpy(&four, a[r].q + 4 * g, 4);
        const __m256i x = _mm256_set1_epi32(four);
        __m256i x_lo = x, x_hi = x;
        if constexpr (BITS == 8) {
          x_lo = _mm256_sign_epi8(x, w_lo);
          x_hi = _mm256_sign_epi8(x, w_hi);
        }
        const __m256i p_lo = _mm256_maddubs_epi16(magnitude_lo, x_lo), p_hi = _mm256_maddubs_epi16(magnitude_hi, x_hi);
        lo[r] = g == g0 ? p_lo : _mm256_add_epi16(lo[r], p_lo);
        hi[r] = g == g0 ? p_hi : _mm256_add_epi16(hi[r], p_hi);
        if constexpr (W > 1) STERNA_IN_ORDER(lo[r], hi[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      acc[r].lo = _mm256_add_epi32(acc[r].lo, _mm256_madd_epi16(lo[r], ones));
      acc[r].hi = _mm256_add_epi32(acc[r].hi, _mm256_madd_epi16(hi[r], ones));
      if constexpr (G1 - G0 > W) STERNA_IN_ORDER(acc[r].lo, acc[r].hi);
    }
  }
}

#undef STERNA_IN_ORDER

}  // namespace
}  // namespace sterna
