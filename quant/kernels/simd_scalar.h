// 16 lanes as plain arrays: the portable reference of every kernel, compiled for the baseline CPU.
#pragma once

#include <cmath>

#include "kernels.h"

namespace sterna {
namespace {

constexpr int kMaxGroup = 4;
constexpr bool kSigned8 = false;
constexpr int kAttnRows = 2;
constexpr int kAttnBlocks = 2;
constexpr int kAttnVectors = 4;

struct VF { float v[16]; };
struct VI { int32_t v[16]; };

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float f = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact
    return sign ? -f : f;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal result: multiples of 2^-24, rounded by the float adder
    float a;
    __builtin_memcpy(&a, &magnitude, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(a * 0x1p24f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

#define STERNA_LANES for (int i = 0; i < 16; ++i)
inline VF vf_set(float x) { VF a; STERNA_LANES a.v[i] = x; return a; }
inline VF vf_zero() { return vf_set(0.0f); }
inline VF vf_load(const float* p) { VF a; STERNA_LANES a.v[i] = p[i]; return a; }
inline VF vf_load_n(const float* p, int n) { VF a; STERNA_LANES a.v[i] = i < n ? p[i] : 0.0f; return a; }
inline void vf_store(float* p, VF a) { STERNA_LANES p[i] = a.v[i]; }
inline VF vf_load_f16(const void* p) {
  uint16_t h[16];
  __builtin_memcpy(h, p, 32);
  VF a; STERNA_LANES a.v[i] = half_to_float(h[i]); return a;
}
inline VF vf_load_bf16(const void* p) {
  uint16_t h[16];
  __builtin_memcpy(h, p, 32);
  VF a;
  STERNA_LANES { const uint32_t x = static_cast<uint32_t>(h[i]) << 16; __builtin_memcpy(&a.v[i], &x, 4); }
  return a;
}
inline void vf_store_f16(uint16_t* p, VF a) { STERNA_LANES p[i] = float_to_half(a.v[i]); }
inline VF operator+(VF a, VF b) { STERNA_LANES a.v[i] += b.v[i]; return a; }
inline VF operator-(VF a, VF b) { STERNA_LANES a.v[i] -= b.v[i]; return a; }
inline VF operator*(VF a, VF b) { STERNA_LANES a.v[i] *= b.v[i]; return a; }
inline VF operator/(VF a, VF b) { STERNA_LANES a.v[i] /= b.v[i]; return a; }
inline VF vf_fma(VF a, VF b, VF c) { STERNA_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
inline VF vf_max(VF a, VF b) { STERNA_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline VF vf_min(VF a, VF b) { STERNA_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline VF vf_abs(VF a) { STERNA_LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
inline VF vf_round(VF a) { STERNA_LANES a.v[i] = std::nearbyintf(a.v[i]); return a; }
inline VF vf_pow2(VF n) {
  STERNA_LANES {
    const uint32_t x = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    __builtin_memcpy(&n.v[i], &x, 4);
  }
  return n;
}
inline VF vf_ldexp(VF p, VF n) { return p * vf_pow2(n); }  // n in [-127, 127]; 2^-127 becomes 0
inline VF vf_first(int n, VF a, float rest) { STERNA_LANES a.v[i] = i < n ? a.v[i] : rest; return a; }
inline VF vf_zero_below(VF x, float limit, VF value) { STERNA_LANES if (x.v[i] < limit) value.v[i] = 0; return value; }
inline float vf_sum(VF a) {
  for (int w = 8; w; w /= 2) for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
  return a.v[0];
}
inline float vf_hmax(VF a) {
  float m = a.v[0];
  STERNA_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}

inline VI vi_set(int32_t x) { VI a; STERNA_LANES a.v[i] = x; return a; }
inline VI vi_zero() { return vi_set(0); }
template <int N>
inline VI vi_shl(VI a) { STERNA_LANES a.v[i] *= 1 << N; return a; }
inline VI operator+(VI a, VI b) { STERNA_LANES a.v[i] += b.v[i]; return a; }
inline void vi_hide(VI& a) { asm volatile("" : "+m"(a)); }
inline VI vi_dot(VI acc, VI w, VI x) {
  for (int byte = 0; byte < 64; ++byte)
    acc.v[byte / 4] += ((w.v[byte / 4] >> 8 * (byte % 4)) & 255) * static_cast<int8_t>(x.v[byte / 4] >> 8 * (byte % 4));
  return acc;
}
inline VF vf_from(VI a) { VF f; STERNA_LANES f.v[i] = static_cast<float>(a.v[i]); return f; }
inline VI vi_round(VF a) { VI n; STERNA_LANES n.v[i] = static_cast<int32_t>(std::nearbyintf(a.v[i])); return n; }
inline int32_t vi_sum(VI a) { int32_t s = 0; STERNA_LANES s += a.v[i]; return s; }
inline VI vi_load(const int16_t* p) { VI a; __builtin_memcpy(&a, p, 64); return a; }
// A lane holds two int16, the first in its low half.
inline VI vi_dot16(VI sum, VI a, VI b) {
  STERNA_LANES {
    const int16_t x[2] = {static_cast<int16_t>(a.v[i]), static_cast<int16_t>(a.v[i] >> 16)};
    const int16_t y[2] = {static_cast<int16_t>(b.v[i]), static_cast<int16_t>(b.v[i] >> 16)};
    sum.v[i] += x[0] * y[0] + x[1] * y[1];
  }
  return sum;
}
inline void vi_store_i16(int16_t* p, VI a) { STERNA_LANES p[i] = static_cast<int16_t>(a.v[i]); }
inline void vi_store_i8(int8_t* p, VI a) { STERNA_LANES p[i] = static_cast<int8_t>(a.v[i]); }
inline VF vf_load_u8(const uint8_t* p) { VF a; STERNA_LANES a.v[i] = p[i]; return a; }
inline VF vf_load_i8(const uint8_t* p) { VF a; STERNA_LANES a.v[i] = static_cast<int8_t>(p[i]); return a; }

template <int BITS, int G0, int G1, int MR>
inline void block_dot(const uint8_t* q, const ActBlock* a, VI* acc) {
  for (int g = G0; g < G1; ++g) {
    for (int byte = 0; byte < 64; ++byte) {
      int w;
      if constexpr (BITS == 8) w = q[64 * g + byte];
      else if constexpr (BITS == 2) w = (q[64 * (g / 4) + byte] >> (2 * (g % 4))) & 3;
      else w = (q[64 * (g / 2) + byte] >> (4 * (g % 2))) & 15;
      if constexpr (BITS == 5) w |= ((q[256 + byte] >> g) & 1) << 4;
      if constexpr (BITS == 6) w |= ((q[256 + 64 * (g / 4) + byte] >> (2 * (g % 4))) & 3) << 4;
      for (int r = 0; r < MR; ++r) acc[r].v[byte / 4] += w * a[r].q[4 * g + byte % 4];
    }
  }
}

}  // namespace
}  // namespace sterna
