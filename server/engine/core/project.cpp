// The projections of a layer: quantized activations, weights by panels, the second pass where eight bits are too few.
// The adapters' low-rank part goes along, see low_rank.cpp.
#include <algorithm>

#include "core.h"

namespace sterna {
namespace {

// Activation bytes of one row block of a matmul: half of a 1 MiB L2, the panel and the outputs share the rest.
constexpr int64_t kRowBlockBytes = 512 << 10;
// A matmul is claimed in pieces of panels: first half of it in equal pieces, one for each member of the team, then half
// of the rest, and so on; the smallest are a 16th of a member's share. Against 8 equal pieces a member: 5 to 9 % of a
// step of one sequence or of eight (streams from memory begin less often), and the wait for the last piece is no longer.
constexpr int kSmallestPieces = 16;

Op op_of(int projection) {
  constexpr Op ops[kNumProjections] = {Op::Qkv, Op::Qkv, Op::Qkv, Op::Out, Op::GateUp, Op::GateUp, Op::Down};
  return projection < 0 ? Op::Head : ops[projection];
}

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
  const LowRank low_rank = plan_low_rank(layer, targets, count);
  matmul_targets(x, x_stride, rows, targets, count, out_stride, accumulate, low_rank.is_int8 ? &low_rank : nullptr);
  profile_.lap(op_of(targets[0].projection));
  if (!low_rank.is_float32) return;
  add_low_rank_float32(low_rank, x, x_stride, out_stride);
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
  matmul_targets(x, x_stride, rows, targets, count, out_stride, true, nullptr);
}

void Core::divide(int units) {
  const int team = model_->team().size(), least = std::max(1, units / (team * kSmallestPieces));
  pieces_.clear();
  for (int at = 0; at < units;) {
    const int each = std::max((units - at) / (2 * team), least);
    for (int i = 0; i < team && at < units; ++i, at += each) pieces_.push_back(at);
  }
  pieces_.push_back(units);
}

void Core::matmul_targets(const float* x, int64_t x_stride, int rows, const Target* targets, int count,
                          int64_t out_stride, bool accumulate, const LowRank* low_rank) {
  const Kernels& k = model_->kernels();
  int panels = 0;
  for (int t = 0; t < count; ++t) panels += targets[t].w->panels;
  const int cols = targets[0].w->cols;
  // Row blocks whose activations stay in L2 while the panels stream by; whole groups only.
  const int block_rows = std::max<int>(8, static_cast<int>(kRowBlockBytes * 2 / 3 / cols) & ~7);
  const int row_blocks = (rows + block_rows - 1) / block_rows;
  divide(row_blocks * panels);
  const int low_rank_chunks = low_rank ? static_cast<int>(lora_chunks_.size()) : 0;
  lora_left_.store(low_rank_chunks, std::memory_order_relaxed);
  const auto multiply = [&](int row_begin, int begin, int end) {
    const int row_end = std::min(rows, row_begin + block_rows);
    int before = 0;
    for (int t = 0; t < count && end > 0; ++t) {
      const PackedMatrix& w = *targets[t].w;
      const int first = std::max(begin, 0), last = std::min(end, w.panels);
      if (first < last) {
        if (is_float(w.format)) {
          k.matmul_float(w, x, x_stride, nullptr, row_begin, row_end, first, last, targets[t].out, out_stride, accumulate);
        } else if (low_rank) {
          multiply_with_low_rank(*low_rank, t, row_begin, row_end, first, last, before, panels, out_stride, accumulate);
        } else {
          k.matmul(w, quantized_, group_, row_begin, row_end, first, last, targets[t].out, out_stride, accumulate);
        }
      }
      begin -= w.panels;
      end -= w.panels;
      before += w.panels;
    }
  };
  model_->team().run(low_rank_chunks + static_cast<int>(pieces_.size()) - 1, [&](int chunk, int member) {
    if (chunk < low_rank_chunks) return reduce_low_rank(*low_rank, chunk, member);
    const int piece = chunk - low_rank_chunks, stop = pieces_[static_cast<size_t>(piece) + 1];
    for (int at = pieces_[static_cast<size_t>(piece)]; at < stop;) {
      const int panel = at % panels, end = std::min(panels, panel + stop - at);
      multiply(at / panels * block_rows, panel, end);
      at += end - panel;
    }
  });
}

}  // namespace sterna
