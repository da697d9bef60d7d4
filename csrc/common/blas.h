// Matrix products by the BLAS that torch was built with. All matrices are row-major.
#pragma once

#include <cstdint>

namespace nemocascade::blas {

// Element (i, j) is at data[i * stride + j].
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// True if the float32 products below are available.
bool has_float_product();

// out [rows, n] = x [rows, k] times weight [k, n], or times the transpose of weight [n, k].
void multiply(const float* x, const float* weight, bool transposed, int64_t rows, int64_t k,
              int64_t n, float* out);

// out [m, n] += left^T right, with left [rows, m] and right [rows, n].
void add_outer(Matrix<float> left, Matrix<float> right, int64_t rows, int64_t m, int64_t n,
               float* out);

// True if a product of bfloat16 matrices into float32 is available. MKL has it; torch does not
// expose it.
bool has_bf16_product();

// The same for the bits of bfloat16: `out = left^T right`, or `+=` if `add` is set.
void outer(Matrix<uint16_t> left, Matrix<uint16_t> right, int64_t rows, int64_t m, int64_t n,
           bool add, float* out);

}  // namespace nemocascade::blas
