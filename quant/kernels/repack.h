// GGUF blocks to the packed panels of kernels.h and back. Portable code, run once at load.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace sterna {

// GGUF's numbers of the tensor types that can be packed.
enum class GgmlType : int32_t {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30,
  TQ1_0 = 34, TQ2_0 = 35,
};

struct TypeInfo {
  Format format;
  int32_t block_values;
  int32_t block_bytes;
};

// False for a type number that is not packed.
bool type_info(int32_t ggml_type, TypeInfo* info);

// Fills everything of `m` but the pointers; q_stride * panels and s_stride * panels bytes must be provided.
void plan_matrix(const TypeInfo& info, int32_t rows, int32_t cols, PackedMatrix* m);

// Packs panels [begin, end). `source` holds the rows in GGUF's layout; row_map gives the source row of each packed
// row (null: the same). Returns false when a scale (or float weight) is not finite.
bool pack_panels(int32_t ggml_type, const uint8_t* source, const int32_t* row_map, const PackedMatrix& m, uint8_t* q,
                 uint8_t* s, int begin, int end);

// One row, dequantized to `cols` floats.
void unpack_row(const PackedMatrix& m, int row, float* out);

}  // namespace sterna
