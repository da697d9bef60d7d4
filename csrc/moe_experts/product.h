// Matrix products by the BLAS that torch was built with. All matrices are row by row.
#pragma once

#include <cstdint>

namespace nemocascade::moe_experts {

// Whether that BLAS can be called from here.
bool has_product();

// out [rows, n] = x [rows, k] times weight [k, n], or times the transpose of weight [n, k].
void multiply(const float* x, const float* weight, bool transposed, int64_t rows, int64_t k,
              int64_t n, float* out);

// out [m, n] += left^T right, with left [rows, m] and right [rows, n]. Strides are between rows.
struct Factor {
  const float* data;
  int64_t stride;
};
void add_outer(Factor left, Factor right, int64_t rows, int64_t m, int64_t n, float* out);

}  // namespace nemocascade::moe_experts
