// 16 float or int32 lanes as one AVX-512 register. Included by exactly one translation unit, in an anonymous
// namespace, so that no instantiation made with these flags can be picked by the linker for another ISA.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace sterna {
namespace {

constexpr int kMaxGroup = 8;      // 8 int32 + 8 float accumulators + weights fit 32 registers
constexpr bool kSigned8 = false;  // 8-bit quants go in unsigned, as every other width
constexpr int kAttnRows = 6;      // 6 rows x 4 blocks of scores, or x 64 dims of output, are 24 accumulators
constexpr int kAttnBlocks = 4;    // key blocks a pass
constexpr int kAttnVectors = 4;   // output vectors a pass

struct VF { __m512 v; };
struct VI { __m512i v; };

inline VF vf_zero() { return {_mm512_setzero_ps()}; }
inline VF vf_set(float x) { return {_mm512_set1_ps(x)}; }
inline VF vf_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VF vf_load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)}; }
inline void vf_store(float* p, VF a) { _mm512_storeu_ps(p, a.v); }
inline VF vf_load_f16(const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline VF vf_load_bf16(const void* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16))};
}
inline void vf_store_f16(uint16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline VF operator+(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VF operator/(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VF vf_fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VF vf_max(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VF vf_min(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VF vf_abs(VF a) { return {_mm512_abs_ps(a.v)}; }
inline VF vf_round(VF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for integral n in [-126, 127]
inline VF vf_pow2(VF n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline VF vf_ldexp(VF p, VF n) { return {_mm512_scalef_ps(p.v, n.v)}; }  // p * 2^n
inline VF vf_first(int n, VF a, float rest) {  // n lanes of a, 0 < n <= 16, then `rest`
  return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), static_cast<__mmask16>((1u << n) - 1), a.v)};
}
inline VF vf_zero_below(VF x, float limit, VF value) {  // x < limit ? 0 : value
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), value.v)};
}
inline float vf_sum(VF a) { return _mm512_reduce_add_ps(a.v); }
inline float vf_hmax(VF a) { return _mm512_reduce_max_ps(a.v); }

inline VI vi_zero() { return {_mm512_setzero_si512()}; }
inline VI vi_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int N>
inline VI vi_shl(VI a) { return {_mm512_slli_epi32(a.v, N)}; }
inline VI operator+(VI a, VI b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline void vi_hide(VI& a) { asm volatile("" : "+v"(a.v)); }  // its value, from the compiler
// 64 products, unsigned w times signed x.
inline VI vi_dot(VI acc, VI w, VI x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
inline VF vf_from(VI a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline VI vi_round(VF a) { return {_mm512_cvtps_epi32(a.v)}; }
inline int32_t vi_sum(VI a) { return _mm512_reduce_add_epi32(a.v); }
inline VI vi_load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
// Each lane + the products of its two int16 with those of b.
// Not the intrinsic: GCC 12 copies its sum before and after each, and spills when 24 of them are live.
inline VI vi_dot16(VI sum, VI a, VI b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
inline void vi_store_i16(int16_t* p, VI a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a.v));
}
inline void vi_store_i8(int8_t* p, VI a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
inline VF vf_load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline VF vf_load_i8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// acc[r] += sum over the 4-value groups [G0, G1) of one block, for MR rows of an activation group.
template <int BITS, int G0, int G1, int MR>
inline void block_dot(const uint8_t* q, const ActBlock* a, VI* acc) {
  const __m512i low4 = _mm512_set1_epi8(0x0f), low2 = _mm512_set1_epi8(0x03);
  const __m512i bit4 = _mm512_set1_epi8(0x10), bits45 = _mm512_set1_epi8(0x30);
  auto load = [&](int i) { return _mm512_loadu_si512(q + 64 * i); };
#pragma GCC unroll 8
  for (int g = G0; g < G1; ++g) {
    __m512i w;
    if constexpr (BITS == 8) {
      w = load(g);
    } else if constexpr (BITS == 2) {
      const __m512i raw = load(g / 4);
      w = _mm512_and_si512(g % 4 ? _mm512_srli_epi16(raw, 2 * (g % 4)) : raw, low2);
    } else {
      const __m512i raw = load(g / 2);
      w = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(raw, 4) : raw, low4);
      if constexpr (BITS == 5) {
        const __m512i high = load(4);
        const __m512i moved = g <= 4 ? _mm512_slli_epi16(high, 4 - g) : _mm512_srli_epi16(high, g - 4);
        w = _mm512_or_si512(w, _mm512_and_si512(moved, bit4));
      }
      if constexpr (BITS == 6) {
        const __m512i high = load(4 + g / 4);
        const int s = 2 * (g % 4);
        const __m512i moved = s <= 4 ? _mm512_slli_epi16(high, 4 - s) : _mm512_srli_epi16(high, s - 4);
        w = _mm512_or_si512(w, _mm512_and_si512(moved, bits45));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a[r].q + 4 * g, 4);
      acc[r].v = _mm512_dpbusd_epi32(acc[r].v, w, _mm512_set1_epi32(four));
    }
  }
}

}  // namespace
}  // namespace sterna
