// From a row of logits to a token. Random numbers are a pure function of (seed, choice, position), so that a
// sequence's tokens do not depend on the batch around it, on preemption or on the order of requests.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sterna {

struct SamplingState {
  float temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  int32_t top_k = 0;
  uint64_t seed = 0;
  uint32_t choice = 0;
  std::vector<int32_t> bias_ids, blocked_ids;
  std::vector<float> bias_values;
  int32_t block_until = 0;
  // Only filled when a penalty is on. `seen` lists every token with a count or prompt mark, once.
  bool has_penalties = false;
  std::vector<int32_t> output_counts;
  std::vector<uint8_t> in_prompt;
  std::vector<int32_t> seen;

  void set_history(const int32_t* prompt, int num_prompt, const int32_t* output, int num_output, int vocab);
  void append(int32_t token);
};

struct SampleRow {
  const SamplingState* state;
  const int32_t* mask;  // one bit a token, or null
  int32_t position;     // absolute position of the token being sampled
  int32_t target;       // -1: sample; else score this token
  int32_t num_top;      // -1: no log-probabilities
};

struct SampleResult {
  int32_t token;
  float logprob;
  int32_t top_ids[20];
  float top_logprobs[20];
};

// Scratch of one thread: two rows of the vocabulary.
struct SampleScratch {
  std::vector<float> raw, probabilities;
  std::vector<int32_t> order;
  explicit SampleScratch(int vocab);
};

// `logits` holds `vocab` values and is changed in place.
void sample_row(const Kernels& kernels, const SampleRow& row, float* logits, int vocab, SampleScratch& scratch,
                SampleResult* result);

// Philox4x32-10 (Salmon et al. 2011), as a double in [0, 1) with 53 bits.
double philox_uniform(uint64_t seed, uint32_t choice, uint32_t position);

}  // namespace sterna
