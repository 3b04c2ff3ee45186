// The compute kernels' interface: packed weights, quantized activations and one table of functions per ISA.
//
// Weights are stored in panels of 16 output rows; the 16 rows are the lanes of one 512-bit register. Along K a
// panel is a sequence of blocks of 32 values; inside a block the bytes of 4 consecutive k of the 16 rows stand
// together (16 x 4 = 64 bytes = one vpdpbusd operand), so one broadcast of 4 activations feeds 16 outputs.
// Quants are unsigned with the offset folded into the activation sums: value = d * (q - offset) [+ m].
// Activations are int8 in blocks of 32 with one float32 scale each (one scale per row would cost 3-4.5 % perplexity);
// a row's blocks all get the same scale where the model was trained with just that rounding (BitNet).
//
// Every function reduces over K (and attends over KV) in one order that does not depend on how many rows are
// computed together, so a row's result is the same bits alone or in a batch. Kernels never allocate or throw.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sterna {

constexpr int kPanel = 16;   // output rows of one panel
constexpr int kBlock = 32;   // K values that share an activation scale
constexpr int kSuper = 256;  // K values of a K-quant or ternary super-block
constexpr int kKvBlock = 16;     // tokens of one KV-cache block
constexpr int kAttnSpan = 128;   // tokens whose attention weights share a scale
constexpr int kAttnTile = 48;    // query rows of one KV head that walk the keys together: 3 KiB a key byte's worth

// int16 elements of one KV head in a block of keys or of values: 16 tokens, then the 16 floats that one step of each is
// worth. Keys are [head_dim / 2][16 tokens][2], values [8 token pairs][head_dim][2]: pairs for the dot products.
inline constexpr int64_t kv_block_elements(int head_dim) { return (static_cast<int64_t>(head_dim) + 2) * kKvBlock; }
// Floats of what one span brings to one row of attention.
inline constexpr int64_t attention_part_floats(int head_dim) { return head_dim + 32; }

// How a packed matrix stores its weights. The number formats are GGUF's; 5- and 6-bit planes are split in a
// 4-bit plane and a plane of the high bits.
enum class Format : int32_t { T2, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, F16, BF16, F32 };

inline constexpr bool is_float(Format f) { return f >= Format::F16; }

struct PackedMatrix {
  Format format;
  int32_t rows;      // output features, before padding to the panel
  int32_t cols;      // K
  int32_t panels;    // ceil(rows / 16)
  const uint8_t* q;  // quants (or float values), panel after panel
  const uint8_t* s;  // scales, panel after panel; null for float formats
  int64_t q_stride;  // bytes a panel
  int64_t s_stride;
};

// 32 activations of one row: x = d * q. neg_sum is minus the sum of the first 16 q, and of all 32; scaled_sum is
// d * sum(q).
struct ActBlock {
  int8_t q[kBlock];
  float d;
  float scaled_sum;
  int32_t neg_sum[2];
};
static_assert(sizeof(ActBlock) == 48);

// Quantized rows are stored in groups of `group` rows (1, 4 or 8): block b of row r is at
// ((r / group) * blocks + b) * group + r % group, so that a kernel walks one pointer for all rows of a group.
inline int64_t act_index(int row, int64_t block, int64_t blocks, int group) {
  return ((row / group) * blocks + block) * group + row % group;
}

// What happens to two residual streams s0 and s1 between two sublayers: the output y of the one is added,
//   s0' = keep s0 + swap s1 + post[0] y,  s1' = swap s0 + keep s1 + post[1] y  (keep + swap = 1: doubly stochastic),
// and the input of the other is read: pre[0] s0' + pre[1] s1'.
struct StreamMix {
  float keep, swap;
  float post[2], pre[2];
};

struct AttentionArgs {
  const float* q;               // first query row of the sequence: [tokens][q_stride], heads side by side
  float* out;                   // [tokens][out_stride]
  int64_t q_stride, out_stride;
  const int16_t* k;             // this layer's keys: [block][kv_head][kv_block_elements(head_dim)]
  const int16_t* v;             // this layer's values, the same
  int64_t block_stride;         // elements between two blocks
  const int32_t* block_table;
  int32_t first_position;       // absolute position of the first query row
  int32_t head_dim;             // padded to a multiple of 16
  int32_t group;                // query heads that share a KV head
  float scale;
};

// Asks for a cache line: 3 into L1, 2 into L2. The empty statement is no decoration: GCC (12.2, -O3) takes a function
// that only prefetches for one without effect and drops its calls, which made a batch of 8 or 32 a fifth slower.
template <int Near>
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, Near);
  asm volatile("");
}

struct Kernels {
  const char* name;
  int32_t max_group;  // largest activation group this ISA's matmul takes

  void (*quantize_rows)(const float* x, int64_t stride, int row_begin, int row_end, int cols, int group,
                        bool one_scale, ActBlock* out);
  // out = x minus what `quantized` says of it: the rounding error, for a second pass at 1/127 of the step.
  void (*rounding_error)(const float* x, int64_t stride, int row_begin, int row_end, int cols, int group,
                         const ActBlock* quantized, float* out);
  // out[row][panel * 16 + lane] (+)= W x for rows [row_begin, row_end) (row_begin a multiple of group) and the panels.
  void (*matmul)(const PackedMatrix& w, const ActBlock* x, int group, int row_begin, int row_end, int panel_begin,
                 int panel_end, float* out, int64_t out_stride, bool accumulate);
  // The same for float weights; `rows` lists the rows of x and out, or is null for row_begin..row_end themselves.
  void (*matmul_float)(const PackedMatrix& w, const float* x, int64_t x_stride, const int32_t* rows, int row_begin,
                       int row_end, int panel_begin, int panel_end, float* out, int64_t out_stride, bool accumulate);
  // out[rows[i]] += B t for `count` <= max_group rows of one adapter and the panels. B is packed as Q8_0, its columns a
  // multiple of 16 (lora.inc); t: [blocks][max_group].
  void (*add_low_rank)(const PackedMatrix& b, const ActBlock* t, const int32_t* rows, int count, int panel_begin,
                       int panel_end, float* out, int64_t out_stride);
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // Half-split rotary embedding of one head in place; cos_sin holds rope_dim/2 cosines, then as many sines.
  void (*rope)(float* head, const float* cos_sin, int rope_dim);
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  void (*relu2_mul)(const float* gate, const float* up, int n, float* out);  // max(gate, 0)^2 * up
  // Streams in place, the next input to out, which may be y or a stream.
  void (*mix_streams)(const StreamMix& mix, const float* y, int n, float* s0, float* s1, float* out);
  void (*add_bias)(float* x, const float* bias, int n);
  void (*store_kv)(const float* k, const float* v, int head_dim, int padded_dim, int slot_in_block, int16_t* k_block,
                   int16_t* v_block);
  // All query heads of KV head `kv_head` for the query tokens [token_begin, token_end) of one sequence.
  void (*attention)(const AttentionArgs& a, int kv_head, int token_begin, int token_end);
  // The same bits by parts, so that threads can share a long context: first all spans of 128 keys, in any order, each to
  // parts[span][token][head of the group][attention_part_floats(head_dim)], then their merging.
  void (*attention_spans)(const AttentionArgs& a, int kv_head, int token_begin, int token_end, int span_begin,
                          int span_end, float* parts);
  void (*attention_merge)(const AttentionArgs& a, int kv_head, int token_begin, int token_end, const float* parts);
  void (*argmax)(const float* x, int n, int32_t* index, float* value);  // the lowest index among equals
  double (*sum_exp)(const float* x, int n, float max, float inv_temperature);
  // probabilities: out[i] = exp((x[i] - max) * inv_temperature)
  void (*exp_shifted)(const float* x, int n, float max, float inv_temperature, float* out);
  // What this ISA can do at most, for benchmarks: int8 multiply-adds (their number is returned), and the sum of words.
  int64_t (*probe_dot)(int64_t rounds, int32_t* checksum);
  uint64_t (*probe_read)(const uint64_t* p, int64_t words);
};

// Null when the CPU (or the operating system) lacks the ISA.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* scalar_kernels();
// "auto" picks the best one of this CPU. Null for an unknown or unsupported name.
const Kernels* find_kernels(const char* name);

}  // namespace sterna
