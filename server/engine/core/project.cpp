// The projections of a layer: quantized activations, weights by panels, the second pass where eight bits are too few,
// and the low-rank part of the adapters.
#include <algorithm>
#include <stdexcept>

#include "core.h"
#include "repack.h"

namespace sterna {
namespace {

// Activation bytes of one row block of a matmul: half of a 1 MiB L2, the panel and the outputs share the rest.
constexpr int64_t kRowBlockBytes = 512 << 10;

Op op_of(int projection) {
  constexpr Op ops[kNumProjections] = {Op::Qkv, Op::Qkv, Op::Qkv, Op::Out, Op::GateUp, Op::GateUp, Op::Down};
  return projection < 0 ? Op::Head : ops[projection];
}

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

void Core::mix_streams(int place, int row, float* out) {
  const int64_t at = row * hidden_stride_;
  model_->kernels().mix_streams(model_->mixes()[static_cast<size_t>(place)], normed_ + at, model_->shape().hidden,
                                x_ + at, second_ + at, out);
}

void Core::norm_quantize(const float* weight, int rows, int sublayer) {
  const ModelShape& s = model_->shape();
  const Kernels& k = model_->kernels();
  for_rows(rows, s.hidden * (second_ ? 2 + kMixWork : 2), [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      float* const to = normed_ + r * hidden_stride_;
      if (second_) mix_streams(sublayer, r, to);
      k.rms_norm(second_ ? to : x_ + r * hidden_stride_, weight, s.hidden, s.rms_norm_eps, to);
    }
    if (s.hidden % kBlock) return;
    k.quantize_rows(normed_, hidden_stride_, begin, end, s.hidden, group_, s.row_scales, quantized_);
  });
}

void Core::quantize(float* x, int64_t stride, int rows, int cols, const float* norm) {
  const ModelShape& s = model_->shape();
  const bool is_quantized = cols % kBlock == 0;  // only float weights have other rows; they read x itself
  if (!norm && !is_quantized) return;
  const Kernels& k = model_->kernels();
  for_rows(rows, norm ? cols * 2 : cols, [&](int begin, int end) {
    for (int r = begin; norm && r < end; ++r) {
      k.rms_norm(x + r * stride, norm, cols, s.rms_norm_eps, x + r * stride);
    }
    if (is_quantized) k.quantize_rows(x, stride, begin, end, cols, group_, s.row_scales, quantized_);
  });
}

void Core::project(int layer, const float* x, int64_t x_stride, int rows, const Target* targets, int count,
                   int64_t out_stride, bool accumulate) {
  matmul_targets(x, x_stride, rows, targets, count, out_stride, accumulate);
  profile_.lap(op_of(targets[0].projection));
  if (lora_groups_.empty()) return;
  apply_lora(layer, x, x_stride, targets, count, out_stride);
  profile_.lap(Op::Lora);
}

void Core::refine(const float* x, int64_t x_stride, int rows, const Target* targets, int count, int64_t out_stride) {
  const int cols = targets[0].w->cols;
  for (int t = 0; t < count; ++t)
    if (is_float(targets[t].w->format)) return;  // float weights read x itself
  const Kernels& k = model_->kernels();
  for_rows(rows, cols * 2, [&](int begin, int end) {
    k.rounding_error(x, x_stride, begin, end, cols, group_, quantized_, error_);
    k.quantize_rows(error_, x_stride, begin, end, cols, group_, false, quantized_);
  });
  matmul_targets(x, x_stride, rows, targets, count, out_stride, true);
}

void Core::matmul_targets(const float* x, int64_t x_stride, int rows, const Target* targets, int count,
                          int64_t out_stride, bool accumulate) {
  const Kernels& k = model_->kernels();
  int panels = 0;
  for (int t = 0; t < count; ++t) panels += targets[t].w->panels;
  const int cols = targets[0].w->cols;
  // Row blocks whose activations stay in L2 while the panels stream by; whole groups only.
  const int block_rows = std::max<int>(8, static_cast<int>(kRowBlockBytes * 2 / 3 / cols) & ~7);
  const int row_blocks = (rows + block_rows - 1) / block_rows;
  const int wanted = model_->team().size() * 8 / row_blocks;
  const int grain = std::max(1, std::min(panels / std::max(wanted, 1), 16));
  const int panel_chunks = (panels + grain - 1) / grain;
  model_->team().run(row_blocks * panel_chunks, [&](int chunk, int) {
    const int row_begin = chunk / panel_chunks * block_rows, row_end = std::min(rows, row_begin + block_rows);
    int begin = chunk % panel_chunks * grain, end = std::min(panels, begin + grain);
    for (int t = 0; t < count && end > 0; ++t) {
      const PackedMatrix& w = *targets[t].w;
      const int first = std::max(begin, 0), last = std::min(end, w.panels);
      if (first < last) {
        if (is_float(w.format)) {
          k.matmul_float(w, x, x_stride, nullptr, row_begin, row_end, first, last, targets[t].out, out_stride, accumulate);
        } else {
          k.matmul(w, quantized_, group_, row_begin, row_end, first, last, targets[t].out, out_stride, accumulate);
        }
      }
      begin -= w.panels;
      end -= w.panels;
    }
  });
}

void Core::apply_lora(int layer, const float* x, int64_t x_stride, const Target* targets, int count, int64_t out_stride) {
  const Kernels& k = model_->kernels();
  const auto pair_of = [&](const LoraGroup& g, int t) -> const LoraPair& {
    return loras_[static_cast<size_t>(g.slot)]->pair(layer, targets[t].projection);
  };
  constexpr int kRows = 32;
  // Each task: one group's rows by 32, for one projection. First t = scale * A x, then out += B t, in one task: the
  // low-rank part of a row is small, and no barrier is needed between the two.
  int tasks = 0;
  for (const auto& g : lora_groups_) tasks += (g.count + kRows - 1) / kRows * count;
  model_->team().run(tasks, [&](int task, int) {
    for (const auto& g : lora_groups_) {
      const int mine = (g.count + kRows - 1) / kRows * count;
      if (task >= mine) {
        task -= mine;
        continue;
      }
      const int t = task % count, begin = task / count * kRows, end = std::min(g.count, begin + kRows);
      const LoraPair& p = pair_of(g, t);
      if (!p.a.q) return;
      const int32_t* rows = lora_rows_.data() + g.begin;
      float* low = lora_t_ + t * kMaxLoraRank;
      k.matmul_float(p.a, x, x_stride, rows, begin, end, 0, p.a.panels, low, 3 * kMaxLoraRank, false);
      for (int i = begin; i < end; ++i) {
        float* row = low + static_cast<int64_t>(rows[i]) * 3 * kMaxLoraRank;
        for (int r = 0; r < p.a.rows; ++r) row[r] *= p.scale;
      }
      k.matmul_float(p.b, low, 3 * kMaxLoraRank, rows, begin, end, 0, p.b.panels, targets[t].out, out_stride, true);
      return;
    }
  });
}

// Reads the slots of the batch only: others may change meanwhile.
void Core::group_lora_rows(const Batch& b) {
  lora_groups_.clear();
  for (int i = 0; i < b.seqs; ++i) {
    if (b.lora_slots[i] < 0) continue;
    int32_t& group = lora_group_of_[static_cast<size_t>(b.lora_slots[i])];
    if (group < 0) {
      group = static_cast<int32_t>(lora_groups_.size());
      lora_groups_.push_back({b.lora_slots[i], 0, 0});
    }
    lora_groups_[static_cast<size_t>(group)].count += b.seq_starts[i + 1] - b.seq_starts[i];
  }
  int begin = 0;
  for (auto& g : lora_groups_) {
    g.begin = begin;
    begin += g.count;
    g.count = 0;
  }
  for (int i = 0; i < b.seqs; ++i) {
    if (b.lora_slots[i] < 0) continue;
    auto& g = lora_groups_[static_cast<size_t>(lora_group_of_[static_cast<size_t>(b.lora_slots[i])])];
    for (int r = b.seq_starts[i]; r < b.seq_starts[i + 1]; ++r) lora_rows_[static_cast<size_t>(g.begin + g.count++)] = r;
  }
  for (const auto& g : lora_groups_) lora_group_of_[static_cast<size_t>(g.slot)] = -1;
}

void Core::set_lora(int slot, std::shared_ptr<Lora> lora) {
  if (slot < 0 || slot >= limits_.max_loras) fail("LoRA slot out of range");
  if (lora) {
    if (lora->model() != model_.get()) fail("the LoRA was made for another model");
    lora->seal();
  }
  loras_[static_cast<size_t>(slot)] = std::move(lora);
}

}  // namespace sterna
