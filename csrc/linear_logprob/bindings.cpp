#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "common/levels.h"
#include "linear_logprob/product.h"
#include "linear_logprob/rows.h"
#include "linear_logprob/tensors.h"

namespace {

using nemocascade::linear_logprob::data;
using nemocascade::linear_logprob::dispatch;
using nemocascade::linear_logprob::kRowsAtATime;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const nemocascade::linear_logprob::RowKernels& row_kernels() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::linear_logprob, row_kernels);
  return best;
}

void logits_statistics(const Tensor& logits, const Tensor& target, double scale, bool entropy,
                       Tensor out) {
  const int64_t rows = logits.size(0);
  const int64_t* ids = data<int64_t>(target, ScalarType::Long, rows, "target");
  float* found = data<float>(out, ScalarType::Float, 4 * rows, "out");
  const nemocascade::linear_logprob::Statistics statistics{found, found + rows, found + 2 * rows,
                                                           entropy ? found + 3 * rows : nullptr};
  const auto& kernels = row_kernels();
  dispatch(logits, scale, kernels.statistics, kernels.statistics_bf16,
           [&](const auto& view, auto kernel) {
             torch::stable::parallel_for(0, rows, kRowsAtATime, [&](int64_t begin, int64_t end) {
               kernel(view, ids, begin, end, statistics);
             });
           });
}

void logits_gradient(Tensor logits, const Tensor& target, double scale, const Tensor& lse,
                     const Tensor& slope, const Tensor& entropy, const Tensor& entropy_slope) {
  const int64_t rows = logits.size(0);
  const int64_t* ids = data<int64_t>(target, ScalarType::Long, rows, "target");
  const nemocascade::linear_logprob::Slopes slopes{
      data<float>(lse, ScalarType::Float, rows, "lse"),
      data<float>(slope, ScalarType::Float, rows, "slope"),
      data<float>(entropy, ScalarType::Float, rows, "entropy"),
      data<float>(entropy_slope, ScalarType::Float, rows, "entropy_slope")};
  const auto& kernels = row_kernels();
  dispatch(logits, scale, kernels.gradient, kernels.gradient_bf16,
           [&](const auto& view, auto kernel) {
             torch::stable::parallel_for(0, rows, kRowsAtATime, [&](int64_t begin, int64_t end) {
               kernel(view, ids, begin, end, slopes);
             });
           });
}

// The bits of a bfloat16 CPU matrix with contiguous rows.
const uint16_t* matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.stride(1) == 1 &&
                      tensor.scalar_type() == ScalarType::BFloat16,
                  name, " must be a bfloat16 CPU matrix with contiguous rows");
  // BLAS counts in 32 bits.
  STD_TORCH_CHECK(tensor.stride(0) <= std::numeric_limits<int>::max() &&
                      tensor.size(0) <= std::numeric_limits<int>::max(),
                  name, " has ", tensor.size(0), " rows, ", tensor.stride(0),
                  " elements apart: both must be below 2^31");
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

bool has_product() { return nemocascade::linear_logprob::has_product(); }

void add_product(Tensor total, const Tensor& left, const Tensor& right, bool add) {
  STD_TORCH_CHECK(nemocascade::linear_logprob::has_product(), "this torch has no such product");
  STD_TORCH_CHECK(left.size(0) == right.size(0), "left and right must have the same rows");
  float* sum = data<float>(total, ScalarType::Float, left.size(1) * right.size(1), "total");
  nemocascade::linear_logprob::product(
      {matrix(left, "left"), left.stride(0), matrix(right, "right"), right.stride(0), left.size(0),
       left.size(1), right.size(1)},
      sum, add);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "logits_statistics(Tensor logits, Tensor target, float scale, bool entropy, Tensor(a!) out) "
      "-> ()");
  m.def(
      "logits_gradient_(Tensor(a!) logits, Tensor target, float scale, Tensor lse, Tensor slope, "
      "Tensor entropy, Tensor entropy_slope) -> ()");
  m.def("has_product() -> bool");
  m.def("add_product_(Tensor(a!) total, Tensor left, Tensor right, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CompositeExplicitAutograd, m) {
  m.impl("has_product", TORCH_BOX(&has_product));
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("logits_statistics", TORCH_BOX(&logits_statistics));
  m.impl("logits_gradient_", TORCH_BOX(&logits_gradient));
  m.impl("add_product_", TORCH_BOX(&add_product));
}
