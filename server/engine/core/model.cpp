// Loading: tensors by name into packed panels, shapes checked against the model.
#include "model.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "repack.h"

namespace sterna {
namespace {

constexpr const char* kProjectionNames[kNumProjections] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                           "gate_proj", "up_proj", "down_proj"};

constexpr int kStreamValues = 5;  // alpha, pre0, pre1, post0, post1

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string size_text(int rows, int cols) { return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")"; }

}  // namespace

int projection_index(const std::string& name) {
  for (int i = 0; i < kNumProjections; ++i)
    if (name == kProjectionNames[i]) return i;
  return -1;
}

std::pair<int, int> projection_size(const ModelShape& s, int projection) {
  const int q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim;
  switch (projection) {
    case kQ: return {q, s.hidden};
    case kK: case kV: return {kv, s.hidden};
    case kO: return {s.hidden, q};
    case kDown: return {s.hidden, s.ffn};
    default: return {s.ffn, s.hidden};
  }
}

Model::Model(ModelShape shape, const Kernels* kernels, int num_threads)
    : shape_(std::move(shape)), kernels_(kernels), team_(num_threads), layers_(static_cast<size_t>(shape_.num_layers)) {
  if (shape_.num_heads % shape_.num_kv_heads) fail("the number of heads is not a multiple of the number of KV heads");
  if (shape_.rope_dim % 2 || shape_.rope_dim > shape_.head_dim) fail("the rotary dimension must be even and at most head_dim");
  if (shape_.head_dim > 512) fail("head_dim " + std::to_string(shape_.head_dim) + " is above 512");
}

PackedMatrix Model::pack(Arena& arena, ThreadTeam& team, int ggml_type, const uint8_t* data, size_t bytes, int rows,
                         int cols, const int32_t* row_map) {
  TypeInfo info;
  if (!type_info(ggml_type, &info)) fail("tensor type " + std::to_string(ggml_type) + " is not supported");
  if (rows <= 0 || cols <= 0 || cols % info.block_values) {
    fail("shape " + size_text(rows, cols) + " does not fit blocks of " + std::to_string(info.block_values));
  }
  const size_t expected = static_cast<size_t>(rows) * static_cast<size_t>(cols / info.block_values) *
                          static_cast<size_t>(info.block_bytes);
  if (bytes != expected) fail(std::to_string(bytes) + " bytes instead of " + std::to_string(expected));
  PackedMatrix m;
  plan_matrix(info, rows, cols, &m);
  uint8_t* q = arena.allocate_array<uint8_t>(static_cast<size_t>(m.q_stride * m.panels));
  uint8_t* s = m.s_stride ? arena.allocate_array<uint8_t>(static_cast<size_t>(m.s_stride * m.panels)) : nullptr;
  m.q = q;
  m.s = s;
  std::atomic<bool> finite{true};
  constexpr int kPanels = 16;  // panels a chunk: 256 rows
  team.run((m.panels + kPanels - 1) / kPanels, [&](int chunk, int) {
    const int begin = chunk * kPanels, end = begin + kPanels < m.panels ? begin + kPanels : m.panels;
    if (!pack_panels(ggml_type, data, row_map, m, q, s, begin, end)) finite.store(false);
  });
  if (!finite) fail("it holds a value or scale that is not finite");
  return m;
}

void Model::add_matrix(const std::string& name, int layer, int ggml_type, const uint8_t* data, size_t bytes, int rows,
                       int cols, const int32_t* row_map) {
  PackedMatrix* to;
  std::pair<int, int> expected = {shape_.vocab, shape_.hidden};
  if (name == "embedding") {
    to = &embedding_;
  } else if (name == "head") {
    to = &head_;
  } else {
    const int p = projection_index(name);
    if (p < 0 || layer < 0 || layer >= shape_.num_layers) fail("no such matrix: " + name);
    to = &layers_[static_cast<size_t>(layer)].projection[p];
    expected = projection_size(shape_, p);
  }
  if (std::pair{rows, cols} != expected) {
    fail("shape " + size_text(rows, cols) + " instead of " + size_text(expected.first, expected.second));
  }
  *to = pack(arena_, team_, ggml_type, data, bytes, rows, cols, row_map);
  weight_bytes_ += static_cast<size_t>((to->q_stride + to->s_stride) * to->panels);
}

void Model::add_vector(const std::string& name, int layer, const float* data, int size) {
  float* copy = arena_.allocate_array<float>(static_cast<size_t>(size) + 16);
  std::memcpy(copy, data, static_cast<size_t>(size) * sizeof(float));
  auto expect = [&](int n) {
    if (size != n) fail(std::to_string(size) + " values instead of " + std::to_string(n));
  };
  if (name == "output_norm") {
    expect(shape_.hidden);
    output_norm_ = copy;
    return;
  }
  if (layer < 0 || layer >= shape_.num_layers) fail("no such layer for " + name);
  Layer& l = layers_[static_cast<size_t>(layer)];
  const int q = shape_.num_heads * shape_.head_dim, kv = shape_.num_kv_heads * shape_.head_dim;
  if (name == "attn_norm") expect(shape_.hidden), l.attn_norm = copy;
  else if (name == "ffn_norm") expect(shape_.hidden), l.ffn_norm = copy;
  else if (name == "q_norm") expect(shape_.head_dim), l.q_norm = copy;
  else if (name == "k_norm") expect(shape_.head_dim), l.k_norm = copy;
  else if (name == "q_bias") expect(q), l.bias[kQ] = copy;
  else if (name == "k_bias") expect(kv), l.bias[kK] = copy;
  else if (name == "v_bias") expect(kv), l.bias[kV] = copy;
  else if (name == "attn_sub_norm") expect(q), l.attn_sub_norm = copy;
  else if (name == "ffn_sub_norm") expect(shape_.ffn), l.ffn_sub_norm = copy;
  else if (name == "streams") expect(2 * kStreamValues), l.streams = copy;
  else fail("no such vector: " + name);
}

void Model::finish() {
  if (!embedding_.q || !output_norm_) fail("the embedding or the output norm is missing");
  for (size_t i = 0; i < layers_.size(); ++i) {
    bool whole = layers_[i].attn_norm && layers_[i].ffn_norm && shape_.two_streams == (layers_[i].streams != nullptr);
    for (const auto& m : layers_[i].projection) whole = whole && m.q;
    if (!whole) fail("layer " + std::to_string(i) + " is incomplete");
  }
  if (!head_.q) head_ = embedding_;
  if (shape_.two_streams) make_mixes();
}

void Model::make_mixes() {
  // Both streams begin as the embedding, and their mean is what the output norm sees.
  StreamMix mix = {1, 0, {0, 0}, {0, 0}};
  for (const auto& layer : layers_) {
    for (const float* of : {layer.streams, layer.streams + kStreamValues}) {
      mix.pre[0] = of[1];
      mix.pre[1] = of[2];
      mixes_.push_back(mix);
      const double keep = 1 / (1 + std::exp(-static_cast<double>(of[0])));
      mix = {static_cast<float>(keep), static_cast<float>(1 - keep), {of[3], of[4]}, {0, 0}};
    }
  }
  mix.pre[0] = mix.pre[1] = 0.5f;
  mixes_.push_back(mix);
}

}  // namespace sterna
