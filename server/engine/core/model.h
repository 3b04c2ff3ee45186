// A model's packed weights and shapes. Filled tensor by tensor at load, read-only afterwards.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "thread_team.h"

namespace sterna {

enum Projection { kQ, kK, kV, kO, kGate, kUp, kDown, kNumProjections };

struct ModelShape {
  int num_layers, hidden, ffn, num_heads, num_kv_heads, head_dim, vocab, rope_dim, max_positions;
  float rms_norm_eps, rope_theta;
  std::vector<float> rope_factors;  // divide the frequencies; empty: none
  bool squared_relu;                // instead of SiLU
  // Activations into a layer's matrices have one scale a row, not one per 32 values: BitNet is trained with them rounded
  // to 127 steps a token. Scales per 32 are nearer to the network without that rounding (by 1.8x on random ones) and
  // farther from the one that was trained: 0.25 instead of 0.19 of the logits' spread over 24 random layers, 0.034 and
  // 0.024 over two.
  bool row_scales;
  bool two_streams;                 // two residual streams, mixed between the sublayers
};

struct Layer {
  PackedMatrix projection[kNumProjections] = {};
  const float* bias[kNumProjections] = {};  // only q, k and v have one (qwen2)
  const float* attn_norm = nullptr;
  const float* ffn_norm = nullptr;
  const float* q_norm = nullptr;  // per head (qwen3)
  const float* k_norm = nullptr;
  const float* attn_sub_norm = nullptr;  // of the attention's output, before o_proj (bitnet)
  const float* ffn_sub_norm = nullptr;   // of the gated activations, before down_proj
  const float* streams = nullptr;        // for attention, then FFN: alpha, pre0, pre1, post0, post1
};

class Model {
 public:
  Model(ModelShape shape, const Kernels* kernels, int num_threads);

  // `name` is "embedding", "head" or a projection ("q_proj" ...); row_map as in pack_panels. Throws
  // std::invalid_argument with the reason.
  void add_matrix(const std::string& name, int layer, int ggml_type, const uint8_t* data, size_t bytes, int rows,
                  int cols, const int32_t* row_map);
  // `name` is "output_norm" or, of a layer, a member of Layer ("attn_norm" ...) or "q_bias", "k_bias", "v_bias".
  void add_vector(const std::string& name, int layer, const float* data, int size);
  // Checks that nothing is missing and ties the head to the embedding when there is none.
  void finish();

  const ModelShape& shape() const { return shape_; }
  const Kernels& kernels() const { return *kernels_; }
  ThreadTeam& team() { return team_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const PackedMatrix& embedding() const { return embedding_; }
  const PackedMatrix& head() const { return head_; }
  const float* output_norm() const { return output_norm_; }
  // Before each sublayer, attention and FFN in turn, and after the last; empty without two streams.
  const std::vector<StreamMix>& mixes() const { return mixes_; }
  size_t weight_bytes() const { return weight_bytes_; }

  // Packs into this arena's memory; also what adapters use for their own.
  static PackedMatrix pack(Arena& arena, ThreadTeam& team, int ggml_type, const uint8_t* data, size_t bytes, int rows,
                           int cols, const int32_t* row_map);

 private:
  void make_mixes();

  ModelShape shape_;
  const Kernels* kernels_;
  ThreadTeam team_;
  Arena arena_;
  std::vector<Layer> layers_;
  PackedMatrix embedding_ = {}, head_ = {};
  const float* output_norm_ = nullptr;
  std::vector<StreamMix> mixes_;
  size_t weight_bytes_ = 0;
};

int projection_index(const std::string& name);  // -1 when it is none
// (rows, columns) that a projection has in this model.
std::pair<int, int> projection_size(const ModelShape& shape, int projection);

}  // namespace sterna
