#include <torch/csrc/stable/library.h>

#include "common/levels.h"
#include "common/tensor.h"
#include "linear_distill_loss/divergence.h"

namespace {

using namespace nemocascade::linear_distill_loss;
using nemocascade::elements;
using nemocascade::Logits;
using torch::stable::Tensor;

void divergence(Tensor logits, const Tensor& teacher, double scale, int64_t kind,
                const Tensor& slope, bool gradient, Tensor out) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kJensenShannon), "divergence ",
                  kind, " is none of 0..2");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const auto other = nemocascade::rows_of(teacher, nemocascade::is_bf16(logits), rows, vocabulary,
                                          "the teacher's logits");
  const float* slopes = elements<float>(slope, rows, "slope");
  float* found = elements<float>(out, 3 * rows, "out");
  const Result result{found, found + rows, found + 2 * rows};
  const auto& kernels = NEMOCASCADE_BEST_OF(nemocascade::linear_distill_loss, divergence_rows);
  const auto with_teacher = [&]<typename T>(DivergenceRows::Of<T> kernel) {
    return [&, kernel](const Logits<T>& view, int64_t begin, int64_t end) {
      const Logits<T> beside{static_cast<T*>(other.data), other.stride, vocabulary, view.scale};
      kernel(view, beside, begin, end, static_cast<Kind>(kind), slopes, gradient, result);
    };
  };
  nemocascade::for_each_row(logits, scale, with_teacher.operator()<float>(kernels.rows),
                            with_teacher.operator()<nemocascade::Bf16>(kernels.rows_bf16));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "divergence_rows_(Tensor(a!) logits, Tensor teacher, float scale, int kind, Tensor slope, "
      "bool gradient, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("divergence_rows_", TORCH_BOX(&divergence));
}
