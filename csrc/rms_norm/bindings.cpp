#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/levels.h"
#include "common/tensor.h"
#include "rms_norm/rms_norm.h"

namespace {

using nemocascade::elements;
using nemocascade::Rows;
using nemocascade::rms_norm::Norm;
using torch::stable::Tensor;

// Rows of a range, the unit of work of a thread. The weight's gradient is summed over ranges in
// order: deterministic for any number of threads.
constexpr int64_t kRangeRows = 256;

const nemocascade::rms_norm::Functions& functions() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::rms_norm, functions);
  return best;
}

// Makes rows of the shape and dtype of x.
Rows rows(const Tensor& tensor, const Tensor& x, const char* name) {
  return nemocascade::rows_of(tensor, nemocascade::is_bf16(x), x.size(0), x.size(1), name);
}

Norm norm_of(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, "x must be a matrix with columns");
  const int64_t width = x.size(1);
  return {rows(x, x, "x"), elements<float>(weight, width, "weight"), width,
          static_cast<float>(eps)};
}

// Calls run(range, first row, end row) for all ranges of `total` rows.
template <typename F>
void for_each_range(int64_t total, const F& run) {
  const int64_t ranges = (total + kRangeRows - 1) / kRangeRows;
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range)
      run(range, range * kRangeRows, std::min(total, (range + 1) * kRangeRows));
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor y) {
  const Norm norm = norm_of(x, weight, eps);
  const Rows to = rows(y, x, "y");
  const auto& chosen = functions();
  for_each_range(x.size(0), [&](int64_t, int64_t begin, int64_t end) {
    chosen.forward(norm, begin, end, to);
  });
}

void rms_norm_backward(const Tensor& x, const Tensor& weight, double eps, const Tensor& dy,
                       Tensor dx, Tensor d_weight) {
  const Norm norm = norm_of(x, weight, eps);
  const Rows upstream = rows(dy, x, "dy"), to = rows(dx, x, "dx");
  const int64_t total = x.size(0), width = norm.width;
  float* wanted = elements<float>(d_weight, width, "d_weight");
  const auto& chosen = functions();
  const int64_t ranges = (total + kRangeRows - 1) / kRangeRows;
  std::vector<float> sums(static_cast<size_t>(ranges * width));
  for_each_range(total, [&](int64_t range, int64_t begin, int64_t end) {
    chosen.backward(norm, begin, end, upstream, to, sums.data() + range * width);
  });
  for (int64_t j = 0; j < width; ++j) {
    double sum = 0.0;
    for (int64_t range = 0; range < ranges; ++range)
      sum += sums[static_cast<size_t>(range * width + j)];
    wanted[j] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) y) -> ()");
  m.def(
      "rms_norm_backward(Tensor x, Tensor weight, float eps, Tensor dy, Tensor(a!) dx, "
      "Tensor(b!) d_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
