#include "moe_experts/product.h"

// libtorch_cpu exports it where it was built with MKL; absent where the BLAS is hidden.
extern "C" __attribute__((weak)) void sgemm_(const char* transpose_a, const char* transpose_b,
                                             const int* m, const int* n, const int* k,
                                             const float* alpha, const float* a, const int* lda,
                                             const float* b, const int* ldb, const float* beta,
                                             float* c, const int* ldc);

namespace nemocascade::moe_experts {
namespace {

// BLAS counts in columns: what it sees are the transposes of our matrices.
void call(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, Factor a, Factor b,
          float beta, float* c) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const int rows = narrow(m), columns = narrow(n), depth = narrow(k);
  const int lda = narrow(a.stride), ldb = narrow(b.stride), ldc = rows;
  const float alpha = 1.0f;
  sgemm_(transpose_a ? "T" : "N", transpose_b ? "T" : "N", &rows, &columns, &depth, &alpha, a.data,
         &lda, b.data, &ldb, &beta, c, &ldc);
}

}  // namespace

bool has_product() { return sgemm_ != nullptr; }

void multiply(const float* x, const float* weight, bool transposed, int64_t rows, int64_t k,
              int64_t n, float* out) {
  call(transposed, false, n, rows, k, {weight, transposed ? k : n}, {x, k}, 0.0f, out);
}

void add_outer(Factor left, Factor right, int64_t rows, int64_t m, int64_t n, float* out) {
  call(false, true, n, m, rows, right, left, 1.0f, out);
}

}  // namespace nemocascade::moe_experts
