// One forward pass: batch checks, the layers in order, logits, sampling.
#include "core.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "repack.h"

namespace sterna {
namespace {

int64_t pad16(int64_t n) { return (n + 15) & ~int64_t{15}; }

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Core::Core(std::shared_ptr<Model> model, CoreLimits limits) : model_(std::move(model)), limits_(limits) {
  const ModelShape& s = model_->shape();
  const int64_t rows = std::max(limits.max_batch_tokens, limits.max_logit_rows);
  padded_dim_ = static_cast<int>(pad16(s.head_dim));
  hidden_stride_ = pad16(s.hidden);
  ffn_stride_ = pad16(s.ffn);
  const int64_t q = pad16(static_cast<int64_t>(s.num_heads) * s.head_dim);
  const int64_t kv = pad16(static_cast<int64_t>(s.num_kv_heads) * s.head_dim);
  q_stride_ = q;
  qkv_stride_ = q + 2 * kv;
  attn_stride_ = static_cast<int64_t>(s.num_heads) * padded_dim_;
  logit_stride_ = pad16(s.vocab);
  mask_words_ = static_cast<int>((pad16(s.vocab) + 31) / 32);

  x_ = arena_.allocate_array<float>(rows * hidden_stride_);
  if (s.two_streams) second_ = arena_.allocate_array<float>(rows * hidden_stride_);
  normed_ = arena_.allocate_array<float>(rows * hidden_stride_);
  error_ = arena_.allocate_array<float>(rows * hidden_stride_);
  qkv_ = arena_.allocate_array<float>(rows * qkv_stride_);
  queries_ = arena_.allocate_array<float>(rows * attn_stride_);
  attn_padded_ = arena_.allocate_array<float>(rows * attn_stride_);
  attn_ = padded_dim_ == s.head_dim ? attn_padded_ : arena_.allocate_array<float>(rows * q_stride_);
  gate_up_ = arena_.allocate_array<float>(rows * 2 * ffn_stride_);
  act_ = arena_.allocate_array<float>(rows * ffn_stride_);
  cos_sin_ = arena_.allocate_array<float>(rows * s.rope_dim);
  lora_t_ = arena_.allocate_array<float>(rows * kMaxTargets * kMaxLoraRank);
  logits_ = arena_.allocate_array<float>(limits.max_logit_rows * logit_stride_);
  masks_ = arena_.allocate_array<int32_t>(static_cast<size_t>(limits.max_logit_rows) * mask_words_);
  const int64_t widest = std::max({hidden_stride_, ffn_stride_, q_stride_});
  const int64_t widest_blocks = (widest + kBlock - 1) / kBlock;
  quantized_ = arena_.allocate_array<ActBlock>(static_cast<size_t>((rows + 7) / 8 * 8 * widest_blocks));
  const size_t group = static_cast<size_t>(model_->kernels().max_group);
  for (int i = 0; i < model_->team().size(); ++i) {
    lora_gathered_.push_back(arena_.allocate_array<ActBlock>(group * static_cast<size_t>(widest_blocks)));
  }
  // Every version may leave a chunk that is not full.
  const size_t chunks = static_cast<size_t>(rows) / group + static_cast<size_t>(std::min<int64_t>(limits.max_loras, rows));
  lora_chunks_.reserve(chunks);
  lora_low_ = arena_.allocate_array<ActBlock>(chunks * kMaxTargets * kLowBlocks * group);

  kv_block_stride_ = s.num_kv_heads * kv_block_elements(padded_dim_);
  for (int i = 0; i < s.num_layers; ++i) {
    k_cache_.push_back(arena_.allocate_array<int16_t>(limits.num_blocks * kv_block_stride_));
    v_cache_.push_back(arena_.allocate_array<int16_t>(limits.num_blocks * kv_block_stride_));
  }
  reserve_attention();
  for (int i = 0; i < s.rope_dim / 2; ++i) {
    const float frequency = 1.0f / std::pow(s.rope_theta, static_cast<float>(2 * i) / static_cast<float>(s.rope_dim));
    frequencies_.push_back(s.rope_factors.empty() ? frequency : frequency / s.rope_factors[static_cast<size_t>(i)]);
  }
  row_seq_.resize(rows);
  row_position_.resize(rows);
  lora_rows_.resize(rows);
  runs_.reserve(static_cast<size_t>(limits.max_logit_rows) + 1);
  lora_groups_.reserve(static_cast<size_t>(limits.max_loras));
  lora_group_of_.assign(static_cast<size_t>(limits.max_loras), -1);
  loras_.resize(static_cast<size_t>(limits.max_loras));
  sequences_.resize(static_cast<size_t>(limits.max_num_seqs));
  for (int i = 0; i < model_->team().size(); ++i) scratch_.emplace_back(s.vocab);
}

void Core::check(const Batch& b) const {
  const ModelShape& s = model_->shape();
  if (b.rows < 1 || b.rows > limits_.max_batch_tokens) fail("the batch has " + std::to_string(b.rows) + " rows");
  if (b.seqs < 1 || b.seqs > b.rows || b.seq_starts[0] != 0 || b.seq_starts[b.seqs] != b.rows) fail("bad seq_starts");
  if (b.logit_count > limits_.max_logit_rows) fail("too many logit rows");
  for (int i = 0; i < b.rows; ++i)
    if (b.token_ids[i] < 0 || b.token_ids[i] >= s.vocab) fail("token id " + std::to_string(b.token_ids[i]) + " is out of range");
  for (int i = 0; i < b.logit_count; ++i)
    if (b.logit_rows[i] < 0 || b.logit_rows[i] >= b.rows) fail("logit row out of range");
  for (int i = 0; i < b.seqs; ++i) {
    const int count = b.seq_starts[i + 1] - b.seq_starts[i], end = b.seq_positions[i] + count;
    if (count < 1 || b.seq_positions[i] < 0 || end > b.max_blocks * kKvBlock || end > s.max_positions) {
      fail("sequence " + std::to_string(i) + " of the batch does not fit its block table");
    }
    for (int j = 0; j < (end + kKvBlock - 1) / kKvBlock; ++j) {
      const int32_t block = b.block_tables[static_cast<int64_t>(i) * b.max_blocks + j];
      if (block < 0 || block >= limits_.num_blocks) fail("KV block out of range");
    }
    const int slot = b.lora_slots[i];
    if (slot >= limits_.max_loras || (slot >= 0 && !loras_[static_cast<size_t>(slot)])) fail("LoRA slot is empty");
  }
}

void Core::prepare(const Batch& b) {
  const ModelShape& s = model_->shape();
  for (int i = 0; i < b.seqs; ++i)
    for (int r = b.seq_starts[i]; r < b.seq_starts[i + 1]; ++r) {
      row_seq_[static_cast<size_t>(r)] = i;
      row_position_[static_cast<size_t>(r)] = b.seq_positions[i] + r - b.seq_starts[i];
    }
  const int max_group = model_->kernels().max_group;
  group_ = b.rows == 1 ? 1 : b.rows <= 4 ? 4 : max_group;

  group_lora_rows(b);
  plan_attention(b);

  const int half = s.rope_dim / 2;
  for_rows(b.rows, 20 * s.rope_dim, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      float* to = cos_sin_ + static_cast<int64_t>(r) * s.rope_dim;
      const float position = static_cast<float>(row_position_[static_cast<size_t>(r)]);
      for (int i = 0; i < half; ++i) {
        const float angle = position * frequencies_[static_cast<size_t>(i)];
        to[i] = std::cos(angle);
        to[half + i] = std::sin(angle);
      }
      const int64_t row = r * hidden_stride_, row_bytes = hidden_stride_ * static_cast<int64_t>(sizeof(float));
      unpack_row(model_->embedding(), b.token_ids[r], x_ + row);
      if (!second_) continue;
      std::memcpy(second_ + row, x_ + row, static_cast<size_t>(row_bytes));
      std::memset(normed_ + row, 0, static_cast<size_t>(row_bytes));  // no sublayer's output yet
    }
  });
}

void Core::forward(const Batch& batch) {
  check(batch);
  profile_.begin();
  prepare(batch);
  profile_.lap(Op::Embed);
  for (int i = 0; i < model_->shape().num_layers; ++i) run_layer(batch, i);
  if (!batch.logit_count) return;
  if (second_) {
    for_rows(batch.rows, model_->shape().hidden * kMixWork, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) mix_streams(2 * model_->shape().num_layers, r, x_ + r * hidden_stride_);
    });
  }
  compute_logits(batch);
}

void Core::run_layer(const Batch& b, int index) {
  const ModelShape& s = model_->shape();
  const Layer& layer = model_->layers()[static_cast<size_t>(index)];
  const int64_t kv = (qkv_stride_ - q_stride_) / 2;

  // With two residual streams, what a sublayer puts out waits in normed_ for the next norm_quantize.
  float* const residual = second_ ? normed_ : x_;
  norm_quantize(layer.attn_norm, b.rows, 2 * index);
  profile_.lap(Op::Norm);
  const Target qkv[3] = {{&layer.projection[kQ], kQ, qkv_},
                         {&layer.projection[kK], kK, qkv_ + q_stride_},
                         {&layer.projection[kV], kV, qkv_ + q_stride_ + kv}};
  project(index, normed_, hidden_stride_, b.rows, qkv, 3, qkv_stride_, false);
  rotate_and_store(b, index);
  profile_.lap(Op::Rope);
  attend(b, index);
  const int64_t attn_stride = attn_ == attn_padded_ ? attn_stride_ : q_stride_;
  quantize(attn_, attn_stride, b.rows, s.num_heads * s.head_dim, layer.attn_sub_norm);
  profile_.lap(Op::Attention);
  const Target o = {&layer.projection[kO], kO, residual};
  project(index, attn_, attn_stride, b.rows, &o, 1, hidden_stride_, !second_);

  norm_quantize(layer.ffn_norm, b.rows, 2 * index + 1);
  profile_.lap(Op::Norm);
  const Target gate_up[2] = {{&layer.projection[kGate], kGate, gate_up_},
                             {&layer.projection[kUp], kUp, gate_up_ + ffn_stride_}};
  project(index, normed_, hidden_stride_, b.rows, gate_up, 2, 2 * ffn_stride_, false);
  // Of all int8 activations those into the last layer's gate and up matter most by far: on the default model they
  // alone make 23 % of the logits' noise variance (the other 29 pairs 16 % together). Sixteen bits there cost 2 %.
  if (index + 1 == s.num_layers && !s.row_scales) refine(normed_, hidden_stride_, b.rows, gate_up, 2, 2 * ffn_stride_);
  profile_.lap(Op::GateUp);
  const Kernels& k = model_->kernels();
  const auto gated = s.squared_relu ? k.relu2_mul : k.silu_mul;
  for_rows(b.rows, s.ffn * 4, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const float* gate = gate_up_ + r * 2 * ffn_stride_;
      float* act = act_ + r * ffn_stride_;
      gated(gate, gate + ffn_stride_, s.ffn, act);
      if (layer.ffn_sub_norm) k.rms_norm(act, layer.ffn_sub_norm, s.ffn, s.rms_norm_eps, act);
    }
    if (s.ffn % kBlock == 0) k.quantize_rows(act_, ffn_stride_, begin, end, s.ffn, group_, s.row_scales, quantized_);
  });
  profile_.lap(Op::Activation);
  const Target down = {&layer.projection[kDown], kDown, residual};
  project(index, act_, ffn_stride_, b.rows, &down, 1, hidden_stride_, !second_);
}

void Core::compute_logits(const Batch& b) {
  const ModelShape& s = model_->shape();
  const Kernels& k = model_->kernels();
  const int rows = b.logit_count;
  group_ = rows == 1 ? 1 : rows <= 4 ? 4 : k.max_group;
  for_rows(rows, s.hidden * 2, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      k.rms_norm(x_ + b.logit_rows[i] * hidden_stride_, model_->output_norm(), s.hidden, s.rms_norm_eps,
                 normed_ + i * hidden_stride_);
    }
    if (s.hidden % kBlock == 0) k.quantize_rows(normed_, hidden_stride_, begin, end, s.hidden, group_, false, quantized_);
  });
  profile_.lap(Op::Norm);
  const Target head = {&model_->head(), -1, logits_};
  lora_groups_.clear();  // no adapter touches the head
  project(0, normed_, hidden_stride_, rows, &head, 1, logit_stride_, false);
}

SamplingState& Core::sequence(int slot) {
  if (slot < 0 || slot >= limits_.max_num_seqs) fail("sequence slot out of range");
  return sequences_[static_cast<size_t>(slot)];
}

void Core::sample(int count, const int32_t* slots, const int32_t* positions, const int32_t* targets,
                  const int32_t* drafts, const int32_t* num_top, const uint8_t* use_mask, int32_t* out_tokens,
                  float* out_logprobs, int32_t* out_top_ids, float* out_top_logprobs) {
  if (count > limits_.max_logit_rows) fail("too many rows to sample");
  profile_.begin();
  const int vocab = model_->shape().vocab;
  for (int i = 0; i < count; ++i) {
    sequence(slots[i]);
    if (num_top[i] > 20 || targets[i] >= vocab) fail("num_top or target out of range");
    if (drafts[i] >= 0 && (i + 1 == count || slots[i + 1] != slots[i])) fail("a draft without a row after it");
  }
  const auto sample_one = [&](int i, int member) {
    const SampleRow row = {&sequences_[static_cast<size_t>(slots[i])],
                           use_mask[i] ? masks_ + static_cast<int64_t>(i) * mask_words_ : nullptr, positions[i],
                           targets[i], num_top[i]};
    SampleResult result;
    sample_row(model_->kernels(), row, logits_ + i * logit_stride_, vocab, scratch_[static_cast<size_t>(member)], &result);
    out_tokens[i] = result.token;
    out_logprobs[i] = result.logprob;
    for (int j = 0; j < num_top[i]; ++j) {
      out_top_ids[i * 20 + j] = result.top_ids[j];
      out_top_logprobs[i * 20 + j] = result.top_logprobs[j];
    }
    if (targets[i] < 0) sequences_[static_cast<size_t>(slots[i])].append(result.token);  // the next row's penalties
  };
  runs_.clear();  // a run's rows wait for one another, runs do not
  for (int i = 0; i < count; ++i)
    if (i == 0 || drafts[i - 1] < 0) runs_.push_back(i);
  const int runs = static_cast<int>(runs_.size());
  runs_.push_back(count);
  model_->team().run(runs, [&](int run, int member) {
    int i = runs_[static_cast<size_t>(run)];
    const int end = runs_[static_cast<size_t>(run) + 1];
    for (bool holds = true; i < end && holds; ++i) {
      sample_one(i, member);
      holds = out_tokens[i] == drafts[i];
    }
    for (; i < end; ++i) out_tokens[i] = -1;
  });
  profile_.lap(Op::Sample);
}

}  // namespace sterna
