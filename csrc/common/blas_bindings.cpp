#include <torch/csrc/stable/library.h>

#include <limits>

#include "common/blas.h"
#include "common/tensor.h"

namespace {

using nemocascade::ScalarType;
using nemocascade::Tensor;

// The bits of a bfloat16 CPU matrix with contiguous rows.
nemocascade::blas::Matrix<uint16_t> matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.stride(1) == 1 &&
                      tensor.scalar_type() == ScalarType::BFloat16,
                  name, " must be a bfloat16 CPU matrix with contiguous rows");
  // BLAS has 32-bit sizes.
  STD_TORCH_CHECK(tensor.stride(0) <= std::numeric_limits<int>::max() &&
                      tensor.size(0) <= std::numeric_limits<int>::max(),
                  name, " has ", tensor.size(0), " rows, ", tensor.stride(0),
                  " elements apart: both must be below 2^31");
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.stride(0)};
}

bool has_product() { return nemocascade::blas::has_bf16_product(); }

void add_product(Tensor total, const Tensor& left, const Tensor& right, bool add) {
  STD_TORCH_CHECK(has_product(), "this torch has no such product");
  STD_TORCH_CHECK(left.size(0) == right.size(0), "left and right must have the same rows");
  const int64_t rows = left.size(0), m = left.size(1), n = right.size(1);
  nemocascade::blas::outer(matrix(left, "left"), matrix(right, "right"), rows, m, n, add,
                           nemocascade::elements<float>(total, m * n, "total"));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def("has_product() -> bool");
  m.def("add_product_(Tensor(a!) total, Tensor left, Tensor right, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CompositeExplicitAutograd, m) {
  m.impl("has_product", TORCH_BOX(&has_product));
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("add_product_", TORCH_BOX(&add_product));
}
