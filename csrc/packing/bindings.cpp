#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/tensor.h"
#include "packing/packing.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_packing(const Tensor& lengths, int64_t capacity,
                                                        int64_t group, double linear,
                                                        double quadratic, int64_t seed) {
  const int64_t* elements = nemocascade::elements<int64_t>(lengths, lengths.numel(), "lengths");
  STD_TORCH_CHECK(capacity >= 1 && group >= 1, "capacity(", capacity, ") and group(", group,
                  ") must be at least 1");
  for (int64_t i = 0; i < lengths.numel(); ++i) {
    STD_TORCH_CHECK(elements[i] >= 1 && elements[i] <= capacity, "lengths[", i, "] = ", elements[i],
                    " must lie in 1..capacity(", capacity, ")");
  }
  const auto plan = nemocascade::packing::plan_packing(
      elements, lengths.numel(), capacity, group, {linear, quadratic}, static_cast<uint64_t>(seed));
  return {nemocascade::int64_tensor(plan.documents, lengths),
          nemocascade::int64_tensor(plan.bin_offsets, lengths),
          nemocascade::int64_tensor(plan.fills, lengths),
          nemocascade::int64_tensor(plan.squares, lengths)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade, m) {
  m.def(
      "plan_packing(Tensor lengths, int capacity, int group, float linear, float quadratic, "
      "int seed) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade, CPU, m) { m.impl("plan_packing", TORCH_BOX(&plan_packing)); }
