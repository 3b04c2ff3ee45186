// Packing an adapter's matrices, shapes checked against the model.
#include "lora.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "repack.h"

namespace sterna {
namespace {

constexpr int kHalf = kBlock / 2;
constexpr int kUnitBytes = 2 + kBlock;  // of a Q8_0 block: f16 scale, int8 values

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

// The largest magnitude. As integers: floats of one sign order alike, and the compiler makes vectors of it.
float largest_magnitude(const float* data, size_t count) {
  int32_t top = 0;
  for (size_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, data + i, sizeof bits);
    top = std::max(top, bits & 0x7fffffff);
  }
  if (top >= 0x7f800000) fail("it holds a value or scale that is not finite");
  float out;
  std::memcpy(&out, &top, sizeof out);
  return out;
}

// Of a value in [0, 1/127], to nearest; below 2^-14 f16 counts in steps of 2^-24.
uint16_t small_to_half(float x) {
  if (x < 0x1p-14f) return static_cast<uint16_t>(x * 0x1p24f + 0.5f);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x1000u - (112u << 23)) >> 13);
}

}  // namespace

Lora::Lora(std::shared_ptr<Model> model) : model_(std::move(model)) {
  layers_.resize(static_cast<size_t>(model_->shape().num_layers));
  // Slabs begin at multiples of 2 MiB: without an offset of its own every version's matrix would fall on the same cache
  // sets, and eight versions in a batch push each other out (3 % of a step).
  arena_.allocate(reinterpret_cast<uintptr_t>(this) / 16 % 1021 * 64);
}

void Lora::add(int layer, const std::string& projection, const float* a, const float* b, int rank, int in_features,
               int out_features, float scale) {
  const ModelShape& s = model_->shape();
  const int p = projection_index(projection);
  if (is_sealed_) fail("a LoRA that a core has cannot be changed");
  if (layer < 0 || layer >= s.num_layers || p < 0) fail("bad LoRA layer or projection");
  if (rank < 1 || rank > kMaxLoraRank) fail("the LoRA rank must be 1 to 64, not " + std::to_string(rank));
  if (projection_size(s, p) != std::pair{out_features, in_features}) fail("LoRA shape does not fit " + projection);
  const PackedMatrix& base = model_->layers()[static_cast<size_t>(layer)].projection[p];
  LoraPair& pair = layers_[static_cast<size_t>(layer)][static_cast<size_t>(p)];
  pair.scale = scale;
  if (is_float(base.format)) {
    pair.a = pack_float32(a, rank, in_features);
    pair.b = pack_float32(b, out_features, rank);
  } else {
    pair.a = pack_int8(a, rank, in_features, &pair.scale);
    pair.b = pack_int8(b, out_features, rank, &pair.scale);
  }
}

PackedMatrix Lora::pack_float32(const float* data, int rows, int cols) {
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float);
  const PackedMatrix m = Model::pack(arena_, alone_, static_cast<int>(GgmlType::F32),
                                     reinterpret_cast<const uint8_t*>(data), bytes, rows, cols, nullptr);
  bytes_ += static_cast<size_t>(m.q_stride * m.panels);
  return m;
}

PackedMatrix Lora::pack_int8(const float* data, int rows, int cols, float* scale) {
  constexpr int type = static_cast<int>(GgmlType::Q8_0);
  const int blocks = (cols + kBlock - 1) / kBlock, padded = blocks * kBlock;
  // f16 scales of values as small as trained ones (1e-3) would be subnormal.
  const float largest = std::max(largest_magnitude(data, static_cast<size_t>(rows) * static_cast<size_t>(cols)), 1e-30f);
  *scale *= largest;
  TypeInfo info;
  type_info(type, &info);
  PackedMatrix m, one;
  plan_matrix(info, rows, padded, &m);
  const int64_t whole = m.q_stride;
  m.cols = (cols + kHalf - 1) / kHalf * kHalf;
  const int64_t kept = m.cols < padded ? whole - kPanel * kHalf : whole;  // lora.inc
  // Values and scales of a panel stand together, so that reading a matrix is one stream.
  m.q_stride = m.s_stride = kept + m.s_stride;
  auto* q = arena_.allocate_array<uint8_t>(static_cast<size_t>(m.q_stride * m.panels));
  m.q = q;
  m.s = q + kept;
  bytes_ += static_cast<size_t>(m.q_stride * m.panels);
  std::vector<float> row(static_cast<size_t>(padded));
  std::vector<ActBlock> rounded(static_cast<size_t>(blocks));
  std::vector<uint8_t> units(static_cast<size_t>(kPanel * blocks * kUnitBytes)), panel(static_cast<size_t>(whole));
  for (int first = 0; first < rows; first += kPanel, q += m.q_stride) {
    const int count = std::min(kPanel, rows - first);
    uint8_t* to = units.data();
    for (int r = first; r < first + count; ++r) {
      const float *from = data + static_cast<int64_t>(r) * cols, inverse = 1.0f / largest;
      for (int i = 0; i < cols; ++i) row[static_cast<size_t>(i)] = from[i] * inverse;
      model_->kernels().quantize_rows(row.data(), padded, 0, 1, padded, 1, false, rounded.data());
      for (const ActBlock& block : rounded) {
        const uint16_t d = small_to_half(block.d);
        std::memcpy(to, &d, sizeof d);
        std::memcpy(to + sizeof d, block.q, kBlock);
        to += kUnitBytes;
      }
    }
    plan_matrix(info, count, padded, &one);
    pack_panels(type, units.data(), nullptr, one, panel.data(), q + kept, 0, 1);
    std::memcpy(q, panel.data(), static_cast<size_t>(kept));
  }
  return m;
}

}  // namespace sterna
