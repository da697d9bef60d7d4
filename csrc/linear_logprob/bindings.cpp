#include <torch/csrc/stable/library.h>

#include "common/levels.h"
#include "common/tensor.h"
#include "linear_logprob/rows.h"

namespace {

using namespace nemocascade::linear_logprob;
using nemocascade::elements;
using torch::stable::Tensor;

const RowKernels& best_kernels() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::linear_logprob, row_kernels);
  return best;
}

void logits_statistics(const Tensor& logits, const Tensor& target, double scale, bool entropy,
                       Tensor out) {
  const int64_t rows = logits.size(0);
  float* found = elements<float>(out, 4 * rows, "out");
  const Statistics statistics{found, found + rows, found + 2 * rows,
                              entropy ? found + 3 * rows : nullptr};
  nemocascade::for_each_row(logits, target, scale, best_kernels().statistics,
                            best_kernels().statistics_bf16, statistics);
}

void logits_gradient(Tensor logits, const Tensor& target, double scale, const Tensor& lse,
                     const Tensor& slope, const Tensor& entropy, const Tensor& entropy_slope) {
  const int64_t rows = logits.size(0);
  const Slopes slopes{elements<float>(lse, rows, "lse"), elements<float>(slope, rows, "slope"),
                      elements<float>(entropy, rows, "entropy"),
                      elements<float>(entropy_slope, rows, "entropy_slope")};
  nemocascade::for_each_row(logits, target, scale, best_kernels().gradient,
                            best_kernels().gradient_bf16, slopes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "logits_statistics(Tensor logits, Tensor target, float scale, bool entropy, Tensor(a!) out) "
      "-> ()");
  m.def(
      "logits_gradient_(Tensor(a!) logits, Tensor target, float scale, Tensor lse, Tensor slope, "
      "Tensor entropy, Tensor entropy_slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("logits_statistics", TORCH_BOX(&logits_statistics));
  m.impl("logits_gradient_", TORCH_BOX(&logits_gradient));
}
