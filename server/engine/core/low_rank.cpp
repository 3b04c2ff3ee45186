// The low-rank part of the adapters in a step. Rows are taken by version, so that a version's factors are read once:
// first t = scale * A x of up to max_group rows at a time, for all projections of that input, as the first chunks of
// the base matrix's own job (no barrier of its own); then out += B t a few panels at a time, right behind the base's
// product, whose result is still in L1. Between the base's panels the factors that come next are asked for: in decode
// they are read once a step from memory, the base's arithmetic meanwhile needs little of it.
//
// Not covered: packing (lora.cpp).
#include <stdexcept>

#include "core.h"

namespace sterna {
namespace {

constexpr int kLine = 64;
// Into L1: 41 MB read beside arithmetic cost 0.8 ms unasked, as much with prefetcht1, nothing with prefetcht0 (Zen 4;
// on a Zen 5 both are as good).
constexpr int kNear = 3;
// Panels whose B a version's rows get at once: enough to make the call cheap, few enough that the outputs stay in L1.
constexpr int kPanelsAtOnce = 4;
constexpr int64_t kLowStride = kMaxTargets * kMaxLoraRank;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Core::LowRank Core::plan_low_rank(int layer, const Target* targets, int count) const {
  LowRank l = {layer, targets, count, false, false, layer, targets[0].projection + count, 0};
  if (targets[0].projection == kDown) l.next_layer = layer + 1, l.next_begin = kQ;
  // In the enum's order those that share an input stand together: q k v, o, gate up, down.
  l.next_end = l.next_begin == kQ ? kV + 1 : l.next_begin == kGate ? kUp + 1 : l.next_begin + 1;
  if (l.next_layer == model_->shape().num_layers) l.next_end = l.next_begin;
  for (const LoraRows& g : lora_groups_)
    for (int t = 0; t < count; ++t) {
      l.is_int8 = l.is_int8 || pair(l, g.slot, t).is_int8();
      l.is_float32 = l.is_float32 || pair(l, g.slot, t).is_float32();
    }
  return l;
}

const LoraPair& Core::pair(const LowRank& l, int slot, int target) const {
  return loras_[static_cast<size_t>(slot)]->pair(l.layer, l.targets[target].projection);
}

ActBlock* Core::low_blocks(int chunk, int target) const {
  return lora_low_ + (chunk * kMaxTargets + target) * kLowBlocks * model_->kernels().max_group;
}

void Core::reduce_low_rank(const LowRank& l, int chunk, int member) {
  const Kernels& k = model_->kernels();
  const LoraRows& c = lora_chunks_[static_cast<size_t>(chunk)];
  const int64_t blocks = l.targets[0].w->cols / kBlock;
  ActBlock* const gathered = lora_gathered_[static_cast<size_t>(member)];
  for (int i = 0; i < c.count; ++i) {
    const ActBlock* from = quantized_ + act_index(lora_rows_[static_cast<size_t>(c.begin + i)], 0, blocks, group_);
    for (int64_t b = 0; b < blocks; ++b) gathered[b * k.max_group + i] = from[b * group_];
  }
  for (int t = 0; t < l.count; ++t) {
    const LoraPair& p = pair(l, c.slot, t);
    if (!p.is_int8()) continue;
    float* const low = lora_t_ + c.begin * kLowStride + t * kMaxLoraRank;
    k.matmul(p.a, gathered, k.max_group, 0, c.count, 0, p.a.panels, low, kLowStride, false);
    const int rank = p.a.panels * kPanel, padded = (rank + kBlock - 1) / kBlock * kBlock;
    for (int i = 0; i < c.count; ++i) {
      float* row = low + i * kLowStride;
      for (int r = 0; r < rank; ++r) row[r] *= p.scale;
      for (int r = rank; r < padded; ++r) row[r] = 0;
    }
    k.quantize_rows(low, kLowStride, 0, c.count, padded, k.max_group, false, low_blocks(chunk, t));
  }
  lora_left_.fetch_sub(1, std::memory_order_release);
}

void Core::multiply_with_low_rank(const LowRank& l, int target, int row_begin, int row_end, int panel_begin,
                                  int panel_end, int before, int panels, int64_t out_stride, bool accumulate) const {
  const Kernels& k = model_->kernels();
  const PackedMatrix& w = *l.targets[target].w;
  for (int first = panel_begin; first < panel_end; first += kPanelsAtOnce) {
    const int last = std::min(first + kPanelsAtOnce, panel_end);
    for (int panel = first; panel < last; ++panel) {
      fetch_now(l, target, panel);
      fetch_next(l, before + panel, panels);
      k.matmul(w, quantized_, group_, row_begin, row_end, panel, panel + 1, l.targets[target].out, out_stride, accumulate);
    }
    add_low_rank(l, target, row_begin, row_end, first, last, out_stride);
  }
}

void Core::fetch_now(const LowRank& l, int target, int64_t panel) const {
  for (const LoraRows& g : lora_groups_) {
    const PackedMatrix& b = pair(l, g.slot, target).b;
    for (int64_t at = 0; at < b.q_stride; at += kLine) prefetch<kNear>(b.q + panel * b.q_stride + at);
  }
}

void Core::fetch_next(const LowRank& l, int64_t part, int64_t parts) const {
  const int64_t per_version = l.next_end - l.next_begin, matrices = per_version * static_cast<int64_t>(lora_groups_.size());
  if (!matrices) return;
  const int64_t matrix = part * matrices / parts, within = part * matrices - matrix * parts;
  const LoraRows& g = lora_groups_[static_cast<size_t>(matrix / per_version)];
  const LoraPair& p = loras_[static_cast<size_t>(g.slot)]->pair(l.next_layer, l.next_begin + static_cast<int>(matrix % per_version));
  if (!p.is_int8()) return;
  const int64_t bytes = p.a.q_stride * p.a.panels;
  const int64_t begin = within < matrices ? 0 : within * bytes / parts, end = std::min(within + matrices, parts) * bytes / parts;
  for (int64_t at = begin & -kLine; at < end; at += kLine) prefetch<kNear>(p.a.q + at);
}

void Core::add_low_rank(const LowRank& l, int target, int row_begin, int row_end, int panel_begin, int panel_end,
                        int64_t out_stride) const {
  const Kernels& k = model_->kernels();
  ThreadTeam::wait_for(lora_left_);
  for (size_t i = 0; i < lora_chunks_.size(); ++i) {
    const LoraRows& c = lora_chunks_[i];
    const LoraPair& p = pair(l, c.slot, target);
    if (!p.is_int8()) continue;
    const int32_t* const rows = lora_rows_.data() + c.begin;
    int first = 0, last = c.count;  // ascending
    while (first < last && rows[first] < row_begin) ++first;
    while (first < last && rows[last - 1] >= row_end) --last;
    k.add_low_rank(p.b, low_blocks(static_cast<int>(i), target) + first, rows + first, last - first, panel_begin,
                   panel_end, l.targets[target].out, out_stride);
  }
}

void Core::add_low_rank_float32(const LowRank& l, const float* x, int64_t x_stride, int64_t out_stride) {
  const Kernels& k = model_->kernels();
  constexpr int kRows = 32;
  // Each task: one version's rows by 32, for one projection. First t = scale * A x, then out += B t, in one task: the
  // low-rank part of a row is small, and no barrier is needed between the two.
  int tasks = 0;
  for (const auto& g : lora_groups_) tasks += (g.count + kRows - 1) / kRows * l.count;
  model_->team().run(tasks, [&](int task, int) {
    for (const auto& g : lora_groups_) {
      const int mine = (g.count + kRows - 1) / kRows * l.count;
      if (task >= mine) {
        task -= mine;
        continue;
      }
      const int t = task % l.count, begin = task / l.count * kRows, end = std::min(g.count, begin + kRows);
      const LoraPair& p = pair(l, g.slot, t);
      if (!p.is_float32()) return;
      const int32_t* rows = lora_rows_.data() + g.begin;
      float* low = lora_t_ + t * kMaxLoraRank;
      k.matmul_float(p.a, x, x_stride, rows, begin, end, 0, p.a.panels, low, kLowStride, false);
      for (int i = begin; i < end; ++i) {
        float* row = low + rows[i] * kLowStride;
        for (int r = 0; r < p.a.rows; ++r) row[r] *= p.scale;
      }
      k.matmul_float(p.b, low, kLowStride, rows, begin, end, 0, p.b.panels, l.targets[t].out, out_stride, true);
      return;
    }
  });
}

// Reads the slots of the batch only: others may change meanwhile.
void Core::group_lora_rows(const Batch& b) {
  lora_groups_.clear();
  lora_chunks_.clear();
  for (int i = 0; i < b.seqs; ++i) {
    if (b.lora_slots[i] < 0) continue;
    int32_t& group = lora_group_of_[static_cast<size_t>(b.lora_slots[i])];
    if (group < 0) {
      group = static_cast<int32_t>(lora_groups_.size());
      lora_groups_.push_back({b.lora_slots[i], 0, 0});
    }
    lora_groups_[static_cast<size_t>(group)].count += b.seq_starts[i + 1] - b.seq_starts[i];
  }
  const int most = model_->kernels().max_group;
  int begin = 0;
  for (auto& g : lora_groups_) {
    for (int at = 0; at < g.count; at += most) lora_chunks_.push_back({g.slot, begin + at, std::min(most, g.count - at)});
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
