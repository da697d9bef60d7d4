#include "common/blas.h"

// libtorch_cpu exports them if it was built with MKL; they are absent with another or a hidden
// BLAS.
extern "C" __attribute__((weak)) void sgemm_(const char* transpose_a, const char* transpose_b,
                                             const int* m, const int* n, const int* k,
                                             const float* alpha, const float* a, const int* lda,
                                             const float* b, const int* ldb, const float* beta,
                                             float* c, const int* ldc);
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int transpose_a,
                                                             int transpose_b, int m, int n, int k,
                                                             float alpha, const uint16_t* a,
                                                             int lda, const uint16_t* b, int ldb,
                                                             float beta, float* c, int ldc);

namespace nemocascade::blas {
namespace {

int narrow(int64_t value) { return static_cast<int>(value); }

// BLAS is column-major: it gets the transposes of our matrices.
void call(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, Matrix<float> a,
          Matrix<float> b, float beta, float* c) {
  const int rows = narrow(m), columns = narrow(n), depth = narrow(k);
  const int lda = narrow(a.stride), ldb = narrow(b.stride), ldc = rows;
  const float alpha = 1.0f;
  sgemm_(transpose_a ? "T" : "N", transpose_b ? "T" : "N", &rows, &columns, &depth, &alpha, a.data,
         &lda, b.data, &ldb, &beta, c, &ldc);
}

}  // namespace

bool has_float_product() { return sgemm_ != nullptr; }

void multiply(const float* x, const float* weight, bool transposed, int64_t rows, int64_t k,
              int64_t n, float* out) {
  call(transposed, false, n, rows, k, {weight, transposed ? k : n}, {x, k}, 0.0f, out);
}

void add_outer(Matrix<float> left, Matrix<float> right, int64_t rows, int64_t m, int64_t n,
               float* out) {
  call(false, true, n, m, rows, right, left, 1.0f, out);
}

bool has_bf16_product() { return cblas_gemm_bf16bf16f32 != nullptr; }

void outer(Matrix<uint16_t> left, Matrix<uint16_t> right, int64_t rows, int64_t m, int64_t n,
           bool add, float* out) {
  constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;
  cblas_gemm_bf16bf16f32(kRowMajor, kTransposed, kPlain, narrow(m), narrow(n), narrow(rows), 1.0f,
                         left.data, narrow(left.stride), right.data, narrow(right.stride),
                         add ? 1.0f : 0.0f, out, narrow(n));
}

}  // namespace nemocascade::blas
