// Packing of GGUF blocks into panels. The block layouts are those of ggml-common.h; the slow twin is the `gguf`
// package (quants.py), compared in tests/quant/test_kernels_pack.py.
#include "repack.h"

#include <cstring>

namespace sterna {
namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float f = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t load_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

bool finite_half(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }

// One row's unit (a GGUF block): unsigned quants and what its scales are made of.
struct Unit {
  uint8_t q[kSuper] = {};
  uint16_t d = 0, m = 0;       // f16 scale and minimum
  uint8_t sub_scale[16] = {};  // K-quants: 6-bit (Q4_K, Q5_K: 8 of them) or int8 (Q6_K: 16) sub-block scales
  uint8_t sub_min[8] = {};
};

void k_scales(const uint8_t* p, Unit* u) {  // 8 scales and 8 minimums of 6 bits in 12 bytes
  for (int j = 0; j < 8; ++j) {
    if (j < 4) {
      u->sub_scale[j] = p[j] & 63;
      u->sub_min[j] = p[j + 4] & 63;
    } else {
      u->sub_scale[j] = static_cast<uint8_t>((p[j + 4] & 15) | ((p[j - 4] >> 6) << 4));
      u->sub_min[j] = static_cast<uint8_t>((p[j + 4] >> 4) | ((p[j] >> 6) << 4));
    }
  }
}

void nibbles(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

void fifth_bits(const uint8_t* p, uint8_t* q) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(q[i] | (((bits >> i) & 1) << 4));
}

void decode_q5_k(const uint8_t* p, Unit* u) {
  k_scales(p + 4, u);
  const uint8_t *high = p + 16, *low = p + 48;
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 32; ++i) {
      u->q[64 * j + i] = static_cast<uint8_t>((low[32 * j + i] & 15) | (((high[i] >> (2 * j)) & 1) << 4));
      u->q[64 * j + 32 + i] = static_cast<uint8_t>((low[32 * j + i] >> 4) | (((high[i] >> (2 * j + 1)) & 1) << 4));
    }
}

void decode_q6_k(const uint8_t* p, Unit* u) {
  for (int n = 0; n < 2; ++n) {
    const uint8_t *low = p + 64 * n, *high = p + 128 + 32 * n;
    uint8_t* q = u->q + 128 * n;
    for (int i = 0; i < 32; ++i) {
      q[i] = static_cast<uint8_t>((low[i] & 15) | ((high[i] & 3) << 4));
      q[i + 32] = static_cast<uint8_t>((low[i + 32] & 15) | (((high[i] >> 2) & 3) << 4));
      q[i + 64] = static_cast<uint8_t>((low[i] >> 4) | (((high[i] >> 4) & 3) << 4));
      q[i + 96] = static_cast<uint8_t>((low[i + 32] >> 4) | ((high[i] >> 6) << 4));
    }
  }
  std::memcpy(u->sub_scale, p + 192, 16);
  u->d = load_half(p + 208);
}

void decode_tq1(const uint8_t* p, Unit* u) {  // five trits a byte: the top digit of byte * 3^n in base 3
  static constexpr uint8_t pow3[5] = {1, 3, 9, 27, 81};
  uint8_t* q = u->q;
  auto trits = [&](const uint8_t* bytes, int count, int digits) {
    for (int n = 0; n < digits; ++n)
      for (int i = 0; i < count; ++i) *q++ = static_cast<uint8_t>((static_cast<uint8_t>(bytes[i] * pow3[n]) * 3) >> 8);
  };
  trits(p, 32, 5);
  trits(p + 32, 16, 5);
  trits(p + 48, 4, 4);
  u->d = load_half(p + 52);
}

void decode_unit(GgmlType type, const uint8_t* p, Unit* u) {
  switch (type) {
    case GgmlType::Q4_0: u->d = load_half(p); nibbles(p + 2, u->q); break;
    case GgmlType::Q4_1: u->d = load_half(p); u->m = load_half(p + 2); nibbles(p + 4, u->q); break;
    case GgmlType::Q5_0: u->d = load_half(p); nibbles(p + 6, u->q); fifth_bits(p + 2, u->q); break;
    case GgmlType::Q5_1:
      u->d = load_half(p); u->m = load_half(p + 2); nibbles(p + 8, u->q); fifth_bits(p + 4, u->q); break;
    case GgmlType::Q8_0:
      u->d = load_half(p);
      for (int i = 0; i < 32; ++i) u->q[i] = p[2 + i] ^ 0x80;
      break;
    case GgmlType::Q4_K:
      u->d = load_half(p); u->m = load_half(p + 2); k_scales(p + 4, u);
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 32; ++i) {
          u->q[64 * j + i] = p[16 + 32 * j + i] & 15;
          u->q[64 * j + 32 + i] = p[16 + 32 * j + i] >> 4;
        }
      break;
    case GgmlType::Q5_K: u->d = load_half(p); u->m = load_half(p + 2); decode_q5_k(p, u); break;
    case GgmlType::Q6_K: decode_q6_k(p, u); break;
    case GgmlType::TQ1_0: decode_tq1(p, u); break;
    case GgmlType::TQ2_0:
      u->d = load_half(p + 64);
      for (int j = 0; j < 2; ++j)
        for (int l = 0; l < 4; ++l)
          for (int i = 0; i < 32; ++i) u->q[128 * j + 32 * l + i] = (p[32 * j + i] >> (2 * l)) & 3;
      break;
    default: break;
  }
}

int format_bits(Format f) {
  switch (f) {
    case Format::T2: return 2;
    case Format::Q4_0: case Format::Q4_1: case Format::Q4_K: return 4;
    case Format::Q5_0: case Format::Q5_1: case Format::Q5_K: return 5;
    case Format::Q6_K: return 6;
    case Format::Q8_0: return 8;
    case Format::F32: return 32;
    default: return 16;
  }
}

int format_offset(Format f) {
  switch (f) {
    case Format::T2: return 1;
    case Format::Q4_0: return 8;
    case Format::Q5_0: return 16;
    case Format::Q6_K: return 32;
    case Format::Q8_0: return 128;
    default: return 0;
  }
}

// 32 quants of 16 rows -> one packed block. Each uint32 holds 4 consecutive k of one row.
void pack_block(int bits, const Unit* units, int k, uint8_t* out) {
  uint32_t w[8][kPanel];
  for (int g = 0; g < 8; ++g)
    for (int r = 0; r < kPanel; ++r) std::memcpy(&w[g][r], units[r].q + k + 4 * g, 4);
  uint32_t packed[8 * kPanel];
  auto plane = [&](int at, int per, int step, int shift, uint32_t mask) {
    for (int j = 0; j < 8 / per; ++j)
      for (int r = 0; r < kPanel; ++r) {
        uint32_t x = 0;
        for (int i = 0; i < per; ++i) x |= ((w[per * j + i][r] >> shift) & mask) << (step * i);
        packed[(at + j) * kPanel + r] = x;
      }
  };
  switch (bits) {
    case 2: plane(0, 4, 2, 0, 0x03030303u); break;
    case 4: plane(0, 2, 4, 0, 0x0f0f0f0fu); break;
    case 5: plane(0, 2, 4, 0, 0x0f0f0f0fu); plane(4, 8, 1, 4, 0x01010101u); break;
    case 6: plane(0, 2, 4, 0, 0x0f0f0f0fu); plane(4, 4, 2, 4, 0x03030303u); break;
    default: plane(0, 1, 8, 0, 0xffffffffu); break;
  }
  std::memcpy(out, packed, static_cast<size_t>(kPanel * kBlock * bits / 8));
}

void put_half(uint8_t* s, int r, uint16_t h) { std::memcpy(s + 2 * r, &h, 2); }

// The scale plane of one unit; its order is what panel_rows in matmul.inc reads.
uint8_t* pack_scales(Format f, const Unit* units, uint8_t* s) {
  for (int r = 0; r < kPanel; ++r) put_half(s, r, units[r].d);
  s += 32;
  if (f == Format::Q4_1 || f == Format::Q5_1 || f == Format::Q4_K || f == Format::Q5_K) {
    for (int r = 0; r < kPanel; ++r) put_half(s, r, units[r].m);
    s += 32;
  }
  if (f == Format::Q4_K || f == Format::Q5_K) {
    for (int j = 0; j < 8; ++j, s += 32)
      for (int r = 0; r < kPanel; ++r) s[r] = units[r].sub_scale[j], s[16 + r] = units[r].sub_min[j];
  }
  if (f == Format::Q6_K) {
    for (int j = 0; j < 16; ++j, s += 16)
      for (int r = 0; r < kPanel; ++r) s[r] = units[r].sub_scale[j];
  }
  return s;
}

bool pack_quantized(GgmlType type, const TypeInfo& info, const uint8_t* source, const int32_t* row_map,
                    const PackedMatrix& m, uint8_t* q, uint8_t* s, int panel) {
  const int bits = format_bits(m.format), units_a_row = m.cols / info.block_values;
  const int64_t row_bytes = static_cast<int64_t>(units_a_row) * info.block_bytes;
  const int block_bytes = kPanel * kBlock * bits / 8;
  bool finite = true;
  Unit units[kPanel];
  for (int u = 0; u < units_a_row; ++u) {
    for (int r = 0; r < kPanel; ++r) {
      const int row = panel * kPanel + r;
      if (row >= m.rows) continue;  // stays zero: scale 0
      const int64_t from = row_map ? row_map[row] : row;
      decode_unit(type, source + from * row_bytes + static_cast<int64_t>(u) * info.block_bytes, &units[r]);
      finite = finite && finite_half(units[r].d) && finite_half(units[r].m);
    }
    for (int k = 0; k < info.block_values; k += kBlock, q += block_bytes) pack_block(bits, units, k, q);
    s = pack_scales(m.format, units, s);
  }
  return finite;
}

template <class W>
bool pack_float(W exponent_mask, const uint8_t* source, const int32_t* row_map, const PackedMatrix& m, uint8_t* q,
                int panel) {
  W* out = reinterpret_cast<W*>(q);
  const W* in = reinterpret_cast<const W*>(source);
  bool finite = true;
  for (int r = 0; r < kPanel; ++r) {
    const int row = panel * kPanel + r;
    const int64_t from = row < m.rows ? (row_map ? row_map[row] : row) : 0;
    for (int64_t k = 0; k < m.cols; ++k) {
      W x = 0;
      if (row < m.rows) std::memcpy(&x, in + from * m.cols + k, sizeof x);
      finite = finite && (x & exponent_mask) != exponent_mask;
      out[k * kPanel + r] = x;
    }
  }
  return finite;
}

float unpack_quant(Format f, const uint8_t* block, int g, int byte) {
  switch (format_bits(f)) {
    case 2: return (block[64 * (g / 4) + byte] >> (2 * (g % 4))) & 3;
    case 4: return (block[64 * (g / 2) + byte] >> (4 * (g % 2))) & 15;
    case 5: return ((block[64 * (g / 2) + byte] >> (4 * (g % 2))) & 15) | (((block[256 + byte] >> g) & 1) << 4);
    case 6:
      return ((block[64 * (g / 2) + byte] >> (4 * (g % 2))) & 15) |
             (((block[256 + 64 * (g / 4) + byte] >> (2 * (g % 4))) & 3) << 4);
    default: return block[64 * g + byte];
  }
}

}  // namespace

bool type_info(int32_t ggml_type, TypeInfo* info) {
  switch (static_cast<GgmlType>(ggml_type)) {
    case GgmlType::F32: *info = {Format::F32, 1, 4}; return true;
    case GgmlType::F16: *info = {Format::F16, 1, 2}; return true;
    case GgmlType::BF16: *info = {Format::BF16, 1, 2}; return true;
    case GgmlType::Q4_0: *info = {Format::Q4_0, 32, 18}; return true;
    case GgmlType::Q4_1: *info = {Format::Q4_1, 32, 20}; return true;
    case GgmlType::Q5_0: *info = {Format::Q5_0, 32, 22}; return true;
    case GgmlType::Q5_1: *info = {Format::Q5_1, 32, 24}; return true;
    case GgmlType::Q8_0: *info = {Format::Q8_0, 32, 34}; return true;
    case GgmlType::Q4_K: *info = {Format::Q4_K, 256, 144}; return true;
    case GgmlType::Q5_K: *info = {Format::Q5_K, 256, 176}; return true;
    case GgmlType::Q6_K: *info = {Format::Q6_K, 256, 210}; return true;
    case GgmlType::TQ1_0: *info = {Format::T2, 256, 54}; return true;
    case GgmlType::TQ2_0: *info = {Format::T2, 256, 66}; return true;
  }
  return false;
}

void plan_matrix(const TypeInfo& info, int32_t rows, int32_t cols, PackedMatrix* m) {
  m->format = info.format;
  m->rows = rows;
  m->cols = cols;
  m->panels = (rows + kPanel - 1) / kPanel;
  m->q = m->s = nullptr;
  m->q_stride = static_cast<int64_t>(cols) * kPanel * format_bits(info.format) / 8;
  int unit_scales = 0;  // bytes of scales for 16 rows of one GGUF block; see pack_scales
  switch (info.format) {
    case Format::T2: case Format::Q4_0: case Format::Q5_0: case Format::Q8_0: unit_scales = 32; break;
    case Format::Q4_1: case Format::Q5_1: unit_scales = 64; break;
    case Format::Q4_K: case Format::Q5_K: unit_scales = 64 + 8 * 32; break;
    case Format::Q6_K: unit_scales = 32 + 16 * 16; break;
    default: break;
  }
  m->s_stride = static_cast<int64_t>(cols / info.block_values) * unit_scales;
}

bool pack_panels(int32_t ggml_type, const uint8_t* source, const int32_t* row_map, const PackedMatrix& m, uint8_t* q,
                 uint8_t* s, int begin, int end) {
  TypeInfo info;
  if (!type_info(ggml_type, &info)) return false;
  bool finite = true;
  for (int panel = begin; panel < end; ++panel) {
    uint8_t* to = q + panel * m.q_stride;
    bool ok;
    switch (m.format) {
      case Format::F32: ok = pack_float<uint32_t>(0x7f800000u, source, row_map, m, to, panel); break;
      case Format::F16: ok = pack_float<uint16_t>(uint16_t{0x7c00}, source, row_map, m, to, panel); break;
      case Format::BF16: ok = pack_float<uint16_t>(uint16_t{0x7f80}, source, row_map, m, to, panel); break;
      default:
        ok = pack_quantized(static_cast<GgmlType>(ggml_type), info, source, row_map, m, to, s + panel * m.s_stride, panel);
    }
    finite = finite && ok;
  }
  return finite;
}

void unpack_row(const PackedMatrix& m, int row, float* out) {
  const uint8_t* q = m.q + row / kPanel * m.q_stride;
  const uint8_t* s = m.s + row / kPanel * m.s_stride;
  const int lane = row % kPanel;
  if (is_float(m.format)) {
    for (int64_t k = 0; k < m.cols; ++k) {
      const int64_t at = k * kPanel + lane;
      if (m.format == Format::F32) {
        std::memcpy(out + k, q + 4 * at, 4);
      } else if (m.format == Format::F16) {
        out[k] = half_to_float(load_half(q + 2 * at));
      } else {
        const uint32_t x = static_cast<uint32_t>(load_half(q + 2 * at)) << 16;
        std::memcpy(out + k, &x, 4);
      }
    }
    return;
  }
  const int block_bytes = kPanel * kBlock * format_bits(m.format) / 8;
  const float offset = static_cast<float>(format_offset(m.format));
  const bool minimum = m.format == Format::Q4_1 || m.format == Format::Q5_1;
  const bool k_quant = m.format == Format::Q4_K || m.format == Format::Q5_K;
  const bool super = k_quant || m.format == Format::Q6_K || m.format == Format::T2;
  float d = 0, dmin = 0;
  for (int b = 0; b < m.cols / kBlock; ++b, q += block_bytes, out += kBlock) {
    if (!super || b % (kSuper / kBlock) == 0) {
      d = half_to_float(load_half(s + 2 * lane));
      s += 32;
      if (minimum || k_quant) dmin = half_to_float(load_half(s + 2 * lane)), s += 32;
    }
    float scale[2] = {d, d}, m_value = minimum ? dmin : 0.0f;
    if (k_quant) {
      scale[0] = scale[1] = d * s[lane];
      m_value = -(dmin * s[16 + lane]);
      s += 32;
    } else if (m.format == Format::Q6_K) {
      scale[0] = d * static_cast<int8_t>(s[lane]);
      scale[1] = d * static_cast<int8_t>(s[16 + lane]);
      s += 32;
    }
    for (int k = 0; k < kBlock; ++k) {
      out[k] = scale[k / 16] * (unpack_quant(m.format, q, k / 4, 4 * lane + k % 4) - offset) + m_value;
    }
  }
}

}  // namespace sterna
