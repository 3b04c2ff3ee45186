// Penalties, masks, temperature, top-k, top-p, min-p and the draw, for one row of logits.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace sterna {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // temperatures below act as 0, as in vLLM

void top_log_probabilities(const float* logits, int vocab, float log_sum, int n, SampleResult* result) {
  int count = 0;  // insertion sort into at most 20 places; the lowest id wins among equals
  for (int i = 0; i < vocab; ++i) {
    if (count == n && (n == 0 || logits[i] <= result->top_logprobs[n - 1])) continue;
    int at = count < n ? count++ : n - 1;
    for (; at > 0 && result->top_logprobs[at - 1] < logits[i]; --at) {
      result->top_logprobs[at] = result->top_logprobs[at - 1];
      result->top_ids[at] = result->top_ids[at - 1];
    }
    result->top_logprobs[at] = logits[i];
    result->top_ids[at] = i;
  }
  for (int i = 0; i < count; ++i) result->top_logprobs[i] -= log_sum;
  for (int i = count; i < n; ++i) result->top_ids[i] = -1;
}

void apply_penalties(const SamplingState& s, float* logits) {
  for (const int32_t token : s.seen) {
    float& l = logits[token];
    const int32_t count = s.output_counts[static_cast<size_t>(token)];
    if (s.repetition_penalty != 1.0f) l = l > 0 ? l / s.repetition_penalty : l * s.repetition_penalty;
    if (count) l -= s.frequency_penalty * static_cast<float>(count) + s.presence_penalty;
  }
}

void apply_mask(const int32_t* mask, float* logits, int vocab) {
  for (int i = 0; i < vocab; i += 32) {
    const uint32_t bits = static_cast<uint32_t>(mask[i / 32]);
    if (bits == 0xffffffffu) continue;
    for (int j = 0; j < 32 && i + j < vocab; ++j)
      if (!((bits >> j) & 1)) logits[i + j] = kMasked;
  }
}

// Every token stays: walk the cumulative sum in token order, first by blocks.
int32_t draw_from_all(const float* p, int vocab, double u) {
  constexpr int kStride = 1024;
  double total = 0;
  double sums[512];  // vocabularies of up to 524,288 tokens by blocks of 1,024; the rest falls into the last one
  const int blocks = std::min((vocab + kStride - 1) / kStride, 512);
  for (int b = 0; b < blocks; ++b) {
    const int end = b == blocks - 1 ? vocab : (b + 1) * kStride;
    double s = 0;
    for (int i = b * kStride; i < end; ++i) s += static_cast<double>(p[i]);
    sums[b] = s;
    total += s;
  }
  double left = u * total;
  int b = 0;
  while (b + 1 < blocks && left >= sums[b]) left -= sums[b++];
  int32_t last = 0;
  for (int i = b * kStride; i < vocab; ++i) {
    if (p[i] <= 0) continue;
    last = i;
    left -= static_cast<double>(p[i]);
    if (left < 0) return i;
  }
  return last;
}

int32_t draw_filtered(const SamplingState& s, const float* logits, int vocab, double u, SampleScratch& scratch) {
  const float* p = scratch.probabilities.data();
  auto& order = scratch.order;
  order.clear();
  const float floor = std::max(s.min_p, std::numeric_limits<float>::min());  // p is relative to the most likely token
  for (int i = 0; i < vocab; ++i)
    if (p[i] >= floor) order.push_back(i);
  auto before = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (order.empty()) return static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
  size_t n = order.size();
  if (s.top_k > 0 && static_cast<size_t>(s.top_k) < n) {
    n = static_cast<size_t>(s.top_k);
    std::nth_element(order.begin(), order.begin() + static_cast<int64_t>(n) - 1, order.end(), before);
    order.resize(n);
  }
  double total = 0;
  for (const int32_t i : order) total += static_cast<double>(p[i]);
  size_t kept = n;
  if (s.top_p < 1.0f) {
    const double wanted = static_cast<double>(s.top_p) * total;
    for (size_t part = 64;; part *= 4) {  // sort only as much of the head as the nucleus needs
      part = std::min(part, n);
      std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(part), order.end(), before);
      double sum = 0;
      size_t k = 0;
      while (k < part && sum < wanted) sum += static_cast<double>(p[order[k++]]);
      if (sum >= wanted || part == n) {
        kept = std::max<size_t>(k, 1);
        break;
      }
    }
    order.resize(kept);
  }
  std::sort(order.begin(), order.end());  // token order, so that the draw is a pure function of the kept set
  double kept_total = 0;
  for (const int32_t i : order) kept_total += static_cast<double>(p[i]);
  double left = u * kept_total;
  for (const int32_t i : order) {
    left -= static_cast<double>(p[i]);
    if (left < 0) return i;
  }
  return order.back();
}

}  // namespace

SampleScratch::SampleScratch(int vocab) : raw(static_cast<size_t>(vocab)), probabilities(static_cast<size_t>(vocab)) {
  order.reserve(static_cast<size_t>(vocab));
}

void SamplingState::set_history(const int32_t* prompt, int num_prompt, const int32_t* output, int num_output, int vocab) {
  seen.clear();
  has_penalties = repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  if (!has_penalties) return;
  output_counts.assign(static_cast<size_t>(vocab), 0);
  in_prompt.assign(static_cast<size_t>(vocab), 0);
  seen.reserve(static_cast<size_t>(vocab));  // a step appends without allocating
  if (repetition_penalty != 1.0f) {  // the other two look at the output alone
    for (int i = 0; i < num_prompt; ++i) {
      uint8_t& mark = in_prompt[static_cast<size_t>(prompt[i])];
      if (!mark) seen.push_back(prompt[i]);
      mark = 1;
    }
  }
  for (int i = 0; i < num_output; ++i) append(output[i]);
}

void SamplingState::append(int32_t token) {
  if (!has_penalties) return;
  const auto i = static_cast<size_t>(token);
  if (output_counts[i]++ == 0 && !in_prompt[i]) seen.push_back(token);
}

double philox_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t c[4] = {position, choice, 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(b);
    c[3] = static_cast<uint32_t>(a);
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c[0]) << 21) ^ (c[1] >> 11);
  return static_cast<double>(bits & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
}

void sample_row(const Kernels& kernels, const SampleRow& row, float* logits, int vocab, SampleScratch& scratch,
                SampleResult* result) {
  int32_t best;
  float max;
  const SamplingState& s = *row.state;
  const bool blocked = row.position < s.block_until && !s.blocked_ids.empty();
  const bool modified = s.has_penalties || !s.bias_ids.empty() || blocked || row.mask;
  float log_sum = 0;
  const float* raw = logits;
  if (row.num_top >= 0 || row.target >= 0) {
    kernels.argmax(logits, vocab, &best, &max);
    log_sum = max + static_cast<float>(std::log(kernels.sum_exp(logits, vocab, max, 1.0f)));
    if (row.num_top >= 0) top_log_probabilities(logits, vocab, log_sum, row.num_top, result);
    if (row.target >= 0) {
      result->token = row.target;
      result->logprob = logits[row.target] - log_sum;
      return;
    }
    if (modified) {
      std::memcpy(scratch.raw.data(), logits, static_cast<size_t>(vocab) * sizeof(float));
      raw = scratch.raw.data();
    }
  }
  if (s.has_penalties) apply_penalties(s, logits);
  for (size_t i = 0; i < s.bias_ids.size(); ++i) logits[s.bias_ids[i]] += s.bias_values[i];
  if (blocked) for (const int32_t id : s.blocked_ids) logits[id] = kMasked;
  if (row.mask) apply_mask(row.mask, logits, vocab);
  kernels.argmax(logits, vocab, &best, &max);
  if (s.temperature >= kGreedyBelow) {
    kernels.exp_shifted(logits, vocab, max, 1.0f / s.temperature, scratch.probabilities.data());
    const double u = philox_uniform(s.seed, s.choice, static_cast<uint32_t>(row.position));
    const bool filtered = s.top_k > 0 || s.top_p < 1.0f || s.min_p > 0.0f;
    best = filtered ? draw_filtered(s, logits, vocab, u, scratch)
                    : draw_from_all(scratch.probabilities.data(), vocab, u);
  }
  result->token = best;
  result->logprob = row.num_top >= 0 ? raw[best] - log_sum : 0.0f;
}

}  // namespace sterna
