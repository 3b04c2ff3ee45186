// Attention of one layer: rotation and storing of keys and values, and who computes what of the reading.
//
// A task is the query rows of some tokens of a sequence, for one KV head. Where few tokens have a long context, its
// keys are shared among tasks and what they bring is merged afterwards, in order: the same bits as in one go.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core.h"

namespace sterna {
namespace {

// Spans of one task where keys are shared: 512 tokens. Four heads of 64 take about 5 us for them, a claim 0.1 us.
constexpr int kTaskSpans = 4;
constexpr int kFewTokens = 8;  // a token and its drafts; a prompt's chunk makes tasks enough
// Contexts that can be shared in one step, of the model's full length each; what is beyond goes by whole sequences, and
// then there are tasks enough.
constexpr int kSharedContexts = 8;

}  // namespace

Core::KvEntry Core::kv_entry(const Batch& b, int index, int row) const {
  const int position = row_position_[static_cast<size_t>(row)], seq = row_seq_[static_cast<size_t>(row)];
  const int64_t at = b.block_tables[static_cast<int64_t>(seq) * b.max_blocks + position / kKvBlock] * kv_block_stride_;
  const size_t layer = static_cast<size_t>(index);
  return {k_cache_[layer] + at, v_cache_[layer] + at, position % kKvBlock};
}

// A key goes to as many cache lines as it has pairs of dimensions, and stores that miss go one by one: asked for here,
// they come while the queries are rotated.
void Core::fetch_entry(const KvEntry& entry) const {
  constexpr int kLine = 32;  // elements
  const int64_t elements = kv_block_elements(padded_dim_);
  for (int64_t head = 0; head < kv_block_stride_; head += elements) {
    for (int64_t at = 0; at < elements; at += kLine) prefetch<2>(entry.k + head + at);
    const int16_t* const pair = entry.v + head + entry.slot / 2 * 2 * padded_dim_;
    for (int at = 0; at < 2 * padded_dim_; at += kLine) prefetch<2>(pair + at);
    prefetch<2>(entry.v + head + padded_dim_ * kKvBlock);
  }
}

void Core::rotate_and_store(const Batch& b, int index) {
  const ModelShape& s = model_->shape();
  const Layer& layer = model_->layers()[static_cast<size_t>(index)];
  const Kernels& k = model_->kernels();
  const int64_t kv = (qkv_stride_ - q_stride_) / 2;
  const int grain = std::clamp(b.rows / (2 * model_->team().size()), kRowsAChunk, kKvBlock);
  for_rows(b.rows, qkv_stride_ * 4, grain, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const KvEntry entry = kv_entry(b, index, r);
      if (r == begin || kv_entry(b, index, r - 1).k != entry.k) fetch_entry(entry);
      float* q = qkv_ + r * qkv_stride_;
      float *keys = q + q_stride_, *values = keys + kv;
      if (layer.bias[kQ]) k.add_bias(q, layer.bias[kQ], s.num_heads * s.head_dim);
      if (layer.bias[kK]) k.add_bias(keys, layer.bias[kK], s.num_kv_heads * s.head_dim);
      if (layer.bias[kV]) k.add_bias(values, layer.bias[kV], s.num_kv_heads * s.head_dim);
      const float* angles = cos_sin_ + static_cast<int64_t>(r) * s.rope_dim;
      float* to = queries_ + r * attn_stride_;
      for (int h = 0; h < s.num_heads; ++h, to += padded_dim_) {
        float* head = q + h * s.head_dim;
        if (layer.q_norm) k.rms_norm(head, layer.q_norm, s.head_dim, s.rms_norm_eps, head);
        k.rope(head, angles, s.rope_dim);
        std::memcpy(to, head, static_cast<size_t>(s.head_dim) * sizeof(float));  // the padding stays zero
      }
    }
    // Head by head: the tokens of a prompt share the lines of a block, 4 KiB a head.
    for (int h = 0; h < s.num_kv_heads; ++h) {
      for (int r = begin; r < end; ++r) {
        const KvEntry entry = kv_entry(b, index, r);
        float* head = qkv_ + r * qkv_stride_ + q_stride_ + h * s.head_dim;
        if (layer.k_norm) k.rms_norm(head, layer.k_norm, s.head_dim, s.rms_norm_eps, head);
        k.rope(head, cos_sin_ + static_cast<int64_t>(r) * s.rope_dim, s.rope_dim);
        const int64_t at = h * kv_block_elements(padded_dim_);
        k.store_kv(head, head + kv, s.head_dim, padded_dim_, entry.slot, entry.k + at, entry.v + at);
      }
    }
  });
}

void Core::reserve_attention() {
  const ModelShape& s = model_->shape();
  // A context as long as the cache or as the model, whichever is shorter. Untouched pages of it cost nothing.
  const int64_t tokens = std::min<int64_t>(s.max_positions, static_cast<int64_t>(limits_.num_blocks) * kKvBlock);
  attention_part_rows_ = kSharedContexts * (tokens / kAttnSpan + 1);
  attention_parts_ = arena_.allocate_array<float>(
      static_cast<size_t>(attention_part_rows_ * s.num_heads * attention_part_floats(padded_dim_)));
  attention_tasks_.reserve(static_cast<size_t>(limits_.max_batch_tokens + attention_part_rows_ / kTaskSpans + kSharedContexts));
  attention_merges_.reserve(static_cast<size_t>(limits_.max_batch_tokens));
}

void Core::plan_attention(const Batch& b) {
  const ModelShape& s = model_->shape();
  const int tokens_a_task = std::max(1, kAttnTile / (s.num_heads / s.num_kv_heads));
  attention_tasks_.clear();
  attention_merges_.clear();
  attention_work_ = 0;
  int64_t used_rows = 0;
  for (int i = 0; i < b.seqs; ++i) {
    const int n = b.seq_starts[i + 1] - b.seq_starts[i], context = b.seq_positions[i] + n;
    const int spans = (context + kAttnSpan - 1) / kAttnSpan;
    attention_work_ += static_cast<int64_t>(n) * context * attn_stride_;
    if (n <= kFewTokens && spans > kTaskSpans && model_->team().size() > 1 && used_rows + spans * n <= attention_part_rows_) {
      float* const parts = attention_parts_ + used_rows * s.num_heads * attention_part_floats(padded_dim_);
      used_rows += spans * n;
      for (int span = 0; span < spans; span += kTaskSpans)
        attention_tasks_.push_back({i, 0, n, span, std::min(spans, span + kTaskSpans), parts});
      attention_merges_.push_back({i, 0, n, 0, spans, parts});
      continue;
    }
    for (int begin = 0; begin < n; begin += tokens_a_task)
      attention_tasks_.push_back({i, begin, std::min(n, begin + tokens_a_task), 0, 0, nullptr});
  }
}

AttentionArgs Core::attention_args(const Batch& b, int seq, int index) const {
  const ModelShape& s = model_->shape();
  const int start = b.seq_starts[seq];
  return {queries_ + start * attn_stride_, attn_padded_ + start * attn_stride_, attn_stride_, attn_stride_,
          k_cache_[static_cast<size_t>(index)], v_cache_[static_cast<size_t>(index)], kv_block_stride_,
          b.block_tables + static_cast<int64_t>(seq) * b.max_blocks, b.seq_positions[seq], padded_dim_,
          s.num_heads / s.num_kv_heads, 1.0f / std::sqrt(static_cast<float>(s.head_dim))};
}

void Core::attend(const Batch& b, int index) {
  const ModelShape& s = model_->shape();
  const Kernels& k = model_->kernels();
  const auto parts_of = [&](const AttentionTask& t, int kv_head) {
    const int64_t rows = static_cast<int64_t>(t.end) * s.num_heads / s.num_kv_heads;
    const int64_t spans = (b.seq_positions[t.seq] + t.end + kAttnSpan - 1) / kAttnSpan;
    return t.parts + kv_head * spans * rows * attention_part_floats(padded_dim_);
  };
  // The last tokens of a prompt see the most keys: from the end, so that no long task is left for the last.
  const int tasks = static_cast<int>(attention_tasks_.size()) * s.num_kv_heads;
  const auto task = [&](int item, int) {
    item = tasks - 1 - item;
    const AttentionTask& t = attention_tasks_[static_cast<size_t>(item / s.num_kv_heads)];
    const int kv_head = item % s.num_kv_heads;
    const AttentionArgs args = attention_args(b, t.seq, index);
    if (!t.parts) k.attention(args, kv_head, t.begin, t.end);
    else k.attention_spans(args, kv_head, t.begin, t.end, t.span_begin, t.span_end, parts_of(t, kv_head));
  };
  const auto merge = [&](int item, int) {
    const AttentionTask& t = attention_merges_[static_cast<size_t>(item / s.num_kv_heads)];
    const int kv_head = item % s.num_kv_heads;
    k.attention_merge(attention_args(b, t.seq, index), kv_head, t.begin, t.end, parts_of(t, kv_head));
  };
  if (attention_work_ < kInlineWork) {
    for (int item = 0; item < tasks; ++item) task(item, 0);
  } else {
    model_->team().run(tasks, task);
  }
  if (!attention_merges_.empty()) model_->team().run(static_cast<int>(attention_merges_.size()) * s.num_kv_heads, merge);
  if (attn_ == attn_padded_) return;
  for (int r = 0; r < b.rows; ++r)
    for (int h = 0; h < s.num_heads; ++h)
      std::memcpy(attn_ + r * q_stride_ + h * s.head_dim, attn_padded_ + r * attn_stride_ + h * padded_dim_,
                  static_cast<size_t>(s.head_dim) * sizeof(float));
}

}  // namespace sterna
