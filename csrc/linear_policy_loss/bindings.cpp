#include <torch/csrc/stable/library.h>

#include "common/levels.h"
#include "common/tensor.h"
#include "linear_policy_loss/policy.h"

namespace {

using namespace nemocascade::linear_policy_loss;
using nemocascade::elements;
using torch::stable::Tensor;

void policy_rows(Tensor logits, const Tensor& target, double scale, int64_t kind,
                 const Tensor& weight, const Tensor& a, const Tensor& b, double x, double y,
                 double grad_scale, bool entropy, bool gradient, Tensor out) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kMopd), "objective ", kind,
                  " is none of 0..3");
  const int64_t rows = logits.size(0);
  const Objective objective{static_cast<Kind>(kind),       elements<float>(weight, rows, "weight"),
                            elements<float>(a, rows, "a"), elements<float>(b, rows, "b"),
                            static_cast<float>(x),         static_cast<float>(y)};
  float* found = elements<float>(out, 3 * rows, "out");
  const Result result{found, found + rows, found + 2 * rows};
  const auto& kernels = NEMOCASCADE_BEST_OF(nemocascade::linear_policy_loss, policy_rows);
  nemocascade::for_each_row(logits, target, scale, kernels.rows, kernels.rows_bf16, objective,
                            static_cast<float>(grad_scale), entropy, gradient, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "policy_rows_(Tensor(a!) logits, Tensor target, float scale, int kind, Tensor weight, "
      "Tensor a, Tensor b, float x, float y, float grad_scale, bool entropy, bool gradient, "
      "Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("policy_rows_", TORCH_BOX(&policy_rows));
}
