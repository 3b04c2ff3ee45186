// The avx2 instantiation of every kernel; CMakeLists.txt gives this file alone its instruction-set flags.
#include "simd_avx2.h"

#include "matmul.inc"
#include "lora.inc"
#include "elementwise.inc"
#include "attention.inc"
#include "probes.inc"

namespace sterna {
namespace {

constexpr Kernels kTable = {"avx2",      kMaxGroup, quantize_rows, rounding_error, matmul,    matmul_float, add_low_rank,
                            rms_norm,    rope,      silu_mul,    relu2_mul, mix_streams,   add_bias,       store_kv,  attention,
                            attention_spans, attention_merge, argmax, sum_exp, exp_shifted,
                            probe_dot, probe_read};

}  // namespace

const Kernels* avx2_table();
const Kernels* avx2_table() { return &kTable; }

}  // namespace sterna
