// Packing an adapter's matrices, shapes checked against the model.
#include "lora.h"

#include <stdexcept>

#include "repack.h"

namespace sterna {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Lora::Lora(std::shared_ptr<Model> model) : model_(std::move(model)) {
  layers_.resize(static_cast<size_t>(model_->shape().num_layers));
}

void Lora::add(int layer, const std::string& projection, const float* a, const float* b, int rank, int in_features,
               int out_features, float scale) {
  const ModelShape& s = model_->shape();
  const int p = projection_index(projection);
  if (is_sealed_) fail("a LoRA that a core has cannot be changed");
  if (layer < 0 || layer >= s.num_layers || p < 0) fail("bad LoRA layer or projection");
  if (rank < 1 || rank > kMaxLoraRank) fail("the LoRA rank must be 1 to 64, not " + std::to_string(rank));
  if (projection_size(s, p) != std::pair{out_features, in_features}) fail("LoRA shape does not fit " + projection);
  const auto pack = [&](const float* data, int rows, int cols) {
    const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float);
    return Model::pack(arena_, alone_, static_cast<int>(GgmlType::F32), reinterpret_cast<const uint8_t*>(data), bytes,
                       rows, cols, nullptr);
  };
  const LoraPair packed{pack(a, rank, in_features), pack(b, out_features, rank), scale};
  layers_[static_cast<size_t>(layer)][static_cast<size_t>(p)] = packed;
}

}  // namespace sterna
