// One adapter version, packed as the core reads it. Filled by a thread of its own while the core steps, since nothing
// here is shared with a step until Core::set_lora; read-only from then on.
//
// Beside a quantized matrix the factors are 8-bit with a scale per 32 values (16 in B's last block): a batch reads the
// factors of every version it mixes once a step, and in float32 that was 19 MB a version of the default model. Their
// rounding is that of the activations, 0.5 % of the adapter's part. Beside a float matrix they stay float32.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "model.h"

namespace sterna {

constexpr int kMaxLoraRank = 64;

// y += scale * b (a x); nothing where a.q is null.
struct LoraPair {
  PackedMatrix a = {}, b = {};
  float scale = 0;

  bool is_int8() const { return a.q && !is_float(a.format); }
  bool is_float32() const { return a.q && is_float(a.format); }
};

class Lora {
 public:
  explicit Lora(std::shared_ptr<Model> model);

  // a: (rank, in), b: (out, rank), rows in Hugging Face order. Throws std::invalid_argument with the reason.
  void add(int layer, const std::string& projection, const float* a, const float* b, int rank, int in_features,
           int out_features, float scale);
  void seal() { is_sealed_ = true; }

  const LoraPair& pair(int layer, int projection) const {
    return layers_[static_cast<size_t>(layer)][static_cast<size_t>(projection)];
  }
  const Model* model() const { return model_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  PackedMatrix pack_float32(const float* data, int rows, int cols);
  // The values divided by the largest of them, by which *scale is multiplied.
  PackedMatrix pack_int8(const float* data, int rows, int cols, float* scale);

  std::shared_ptr<Model> model_;
  Arena arena_;
  ThreadTeam alone_{1};  // the model's own team is the steps'
  std::vector<std::array<LoraPair, kNumProjections>> layers_;
  size_t bytes_ = 0;
  std::atomic<bool> is_sealed_{false};
};

}  // namespace sterna
