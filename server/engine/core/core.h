// The engine's core: one forward pass over a mixed batch of prefill chunks and decodes with a paged KV cache and
// per-sequence LoRA, and the sampler. Buffers are allocated at construction; a step allocates nothing.
//
// Rows of the batch are grouped by sequence. Nothing here knows of requests, text or scheduling.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "lora.h"
#include "model.h"
#include "profile.h"
#include "sampler.h"

namespace sterna {

// Work below this many multiply-adds stays on the calling thread: waking the others costs about as much.
constexpr int64_t kInlineWork = 20000;
constexpr int kRowsAChunk = 4;
constexpr int kLowBlocks = (kMaxLoraRank + kBlock - 1) / kBlock;
constexpr int kMaxTargets = 3;   // projections that share an input: q, k and v
constexpr int64_t kMixWork = 6;  // of mixing two residual streams, in multiply-adds a value

struct CoreLimits {
  int num_blocks, max_num_seqs, max_batch_tokens, max_logit_rows, max_loras;
};

// One step's input; all arrays are the caller's. See Core::forward.
struct Batch {
  const int32_t* token_ids;      // [rows]
  int rows;
  const int32_t* seq_starts;     // [seqs + 1]
  const int32_t* seq_positions;  // [seqs] absolute position of each sequence's first row
  int seqs;
  const int32_t* block_tables;   // [seqs][max_blocks]
  int max_blocks;
  const int32_t* lora_slots;     // [seqs], -1: none
  const int32_t* logit_rows;     // [logit_count]
  int logit_count;
};

class Core {
 public:
  Core(std::shared_ptr<Model> model, CoreLimits limits);

  // Logits of `logit_rows` end up in logits(). Throws std::invalid_argument on any index out of range.
  void forward(const Batch& batch);
  float* logits() { return logits_; }
  int64_t logit_stride() const { return logit_stride_; }

  SamplingState& sequence(int slot);
  int32_t* masks() { return masks_; }  // [max_logit_rows][mask_words]
  int mask_words() const { return mask_words_; }
  // Samples or scores the logit rows of the last forward, in order. Where a row has a draft (else -1), the next row was
  // computed as if that token would be sampled: it follows in the same slot, and when another token is, it and all rows
  // that lean on it get token -1 and leave no trace. So a step may verify several tokens of a sequence.
  void sample(int count, const int32_t* slots, const int32_t* positions, const int32_t* targets, const int32_t* drafts,
              const int32_t* num_top, const uint8_t* use_mask, int32_t* out_tokens, float* out_logprobs,
              int32_t* out_top_ids, float* out_top_logprobs);

  // Null empties the slot. Any thread, also during a step, if no sequence of the step uses the slot.
  void set_lora(int slot, std::shared_ptr<Lora> lora);

  Profile& profile() { return profile_; }
  Model& model() { return *model_; }
  const std::shared_ptr<Model>& shared_model() const { return model_; }
  const CoreLimits& limits() const { return limits_; }

 private:
  struct LoraRows { int slot, begin, count; };  // rows lora_rows_[begin .. begin + count)
  // Query tokens [begin, end) of a sequence and, where its keys are shared among threads, spans of keys and a place for
  // what they bring; else parts is null.
  struct AttentionTask { int seq, begin, end, span_begin, span_end; float* parts; };
  struct KvEntry { int16_t *k, *v; int slot; };  // the block of a row's token, its first head, and the token's place
  struct Target { const PackedMatrix* w; int projection; float* out; };
  struct LowRank {  // what the batch's adapters add to the targets of one input
    int layer;
    const Target* targets;
    int count;
    bool is_int8, is_float32;  // whether any pair is; neither without adapters
    int next_layer, next_begin, next_end;  // the projections whose A is needed next
  };

  void check(const Batch& batch) const;
  void prepare(const Batch& batch);
  void group_lora_rows(const Batch& batch);
  void run_layer(const Batch& batch, int index);
  // normed_ and quantized_ from the residual, before `sublayer`. With two streams, the output of the sublayer before is
  // in normed_ and goes into them first.
  void norm_quantize(const float* weight, int rows, int sublayer);
  void mix_streams(int place, int row, float* out);
  // quantized_ from x, which is normalized in place where there is a `norm`.
  void quantize(float* x, int64_t stride, int rows, int cols, const float* norm);
  // out (+)= W x + LoRA for up to three projections of the same input.
  void project(int layer, const float* x, int64_t x_stride, int rows, const Target* targets, int count,
               int64_t out_stride, bool accumulate);
  // A second pass over the rounding errors of the activations in quantized_: out += W (x - quantized x).
  void refine(const float* x, int64_t x_stride, int rows, const Target* targets, int count, int64_t out_stride);
  void matmul_targets(const float* x, int64_t x_stride, int rows, const Target* targets, int count, int64_t out_stride,
                      bool accumulate, const LowRank* low_rank);
  void divide(int units);  // into pieces_

  LowRank plan_low_rank(int layer, const Target* targets, int count) const;
  const LoraPair& pair(const LowRank& l, int slot, int target) const;
  ActBlock* low_blocks(int chunk, int target) const;
  // lora_low_ = A x of the rows of one chunk, for all targets; counts lora_left_ down.
  void reduce_low_rank(const LowRank& l, int chunk, int member);
  // The base's product of a range of rows and panels, and out += B lora_low_, for which it waits until lora_left_ is
  // zero. `panels` of all targets in the job, of which `before` come before this target.
  void multiply_with_low_rank(const LowRank& l, int target, int row_begin, int row_end, int panel_begin, int panel_end,
                              int before, int panels, int64_t out_stride, bool accumulate) const;
  void add_low_rank(const LowRank& l, int target, int row_begin, int row_end, int panel_begin, int panel_end,
                    int64_t out_stride) const;
  // Asks for the B of a target's panel, or for part `part` of `parts` of the next projections' A, from memory.
  void fetch_now(const LowRank& l, int target, int64_t panel) const;
  void fetch_next(const LowRank& l, int64_t part, int64_t parts) const;
  void add_low_rank_float32(const LowRank& l, const float* x, int64_t x_stride, int64_t out_stride);
  void rotate_and_store(const Batch& batch, int index);
  KvEntry kv_entry(const Batch& batch, int index, int row) const;
  void fetch_entry(const KvEntry& entry) const;
  void reserve_attention();
  void plan_attention(const Batch& batch);
  AttentionArgs attention_args(const Batch& batch, int seq, int index) const;
  void attend(const Batch& batch, int index);
  void compute_logits(const Batch& batch);
  template <class F>
  void for_rows(int rows, int64_t work_a_row, int grain, F&& f);
  template <class F>
  void for_rows(int rows, int64_t work_a_row, F&& f);

  std::shared_ptr<Model> model_;
  CoreLimits limits_;
  Profile profile_;
  Arena arena_;
  int padded_dim_, mask_words_;
  int64_t hidden_stride_, ffn_stride_, q_stride_, qkv_stride_, attn_stride_, logit_stride_, kv_block_stride_;
  std::vector<float> frequencies_;
  std::vector<int16_t*> k_cache_, v_cache_;
  std::vector<AttentionTask> attention_tasks_;
  std::vector<AttentionTask> attention_merges_;  // of the shared sequences
  float* attention_parts_;
  int64_t attention_part_rows_;  // of all heads of one token, over one span: what attention_parts_ has room for
  int64_t attention_work_ = 0;   // multiply-adds of a layer, about
  float *x_, *normed_, *error_, *qkv_, *queries_, *attn_padded_, *attn_, *gate_up_, *act_, *cos_sin_, *lora_t_, *logits_;
  float* second_ = nullptr;  // the second residual stream; x_ is the first
  ActBlock* quantized_;
  int32_t* masks_;
  int group_ = 1;
  std::vector<int32_t> pieces_;  // of a matmul: where each begins, then the end
  std::vector<int32_t> row_seq_, row_position_, lora_rows_, runs_;
  std::vector<LoraRows> lora_groups_;  // by version
  std::vector<LoraRows> lora_chunks_;  // the same, at most max_group rows each
  std::vector<ActBlock*> lora_gathered_;  // by member: the activations of a chunk's rows, one group
  ActBlock* lora_low_;                    // [chunk][3 targets][kLowBlocks][max_group]
  std::atomic<int32_t> lora_left_{0};     // chunks of reduce_low_rank that are not done
  std::vector<int32_t> lora_group_of_;  // by slot; -1 but inside group_lora_rows
  std::vector<std::shared_ptr<Lora>> loras_;
  std::vector<SamplingState> sequences_;
  std::vector<SampleScratch> scratch_;
};

// f(begin, end) for chunks of `grain` rows. Two threads may share a group of eight: four rows of an activation block are
// three whole cache lines.
template <class F>
void Core::for_rows(int rows, int64_t work_a_row, int grain, F&& f) {
  if (rows * work_a_row < kInlineWork) {
    f(0, rows);
    return;
  }
  const int chunks = (rows + grain - 1) / grain;
  model_->team().run(chunks, [&](int chunk, int) { f(chunk * grain, std::min(rows, (chunk + 1) * grain)); });
}

template <class F>
void Core::for_rows(int rows, int64_t work_a_row, F&& f) {
  for_rows(rows, work_a_row, std::min(group_, kRowsAChunk), f);
}

}  // namespace sterna
