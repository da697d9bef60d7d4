#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "moe_router/router.h"

namespace {

using nemocascade::check_ids;
using nemocascade::elements;
using nemocascade::router_settings;
using torch::stable::Tensor;

// Minimum tokens of a thread: for fewer, scheduling costs more than the work.
constexpr int64_t kTokensAtATime = 256;

void moe_choose(const Tensor& scores, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& given,
                int64_t top_k, int64_t groups, int64_t top_groups, bool normalize, double scale,
                Tensor experts, Tensor weights) {
  const int64_t tokens = scores.size(0), count = scores.size(1), slots = tokens * top_k;
  const auto settings = router_settings(count, top_k, groups, top_groups, normalize, scale);
  const float* from = elements<float>(scores, tokens * count, "scores");
  const float* biases = elements<float>(bias, count, "bias");
  const bool* masks = elements<bool>(mask, tokens, "mask");
  const int32_t* ids = elements<int32_t>(given, slots, "given");
  if (ids != nullptr) check_ids(ids, slots, count, "experts");
  int32_t* chosen = elements<int32_t>(experts, slots, "experts");
  float* weighed = elements<float>(weights, slots, "weights");
  torch::stable::parallel_for(0, tokens, kTokensAtATime, [&](int64_t begin, int64_t end) {
    nemocascade::choose_experts(from, biases, masks, ids, settings, begin, end, chosen, weighed);
  });
}

void moe_sort_slots(const Tensor& experts, int64_t num_experts, Tensor counts, Tensor order,
                    Tensor offsets, Tensor positions) {
  const int64_t slots = experts.numel();
  const int32_t* ids = elements<int32_t>(experts, slots, "experts");
  check_ids(ids, slots, num_experts, "experts");
  nemocascade::sort_slots(
      ids, slots, static_cast<int32_t>(num_experts),
      {elements<int32_t>(counts, num_experts, "counts"), elements<int32_t>(order, slots, "order"),
       elements<int32_t>(offsets, num_experts + 1, "offsets"),
       elements<int32_t>(positions, slots, "positions")});
}

void moe_choose_gradient(const Tensor& grad_weights, const Tensor& scores, const Tensor& experts,
                         bool softmax, bool normalize, double scale, Tensor grad_logits) {
  const int64_t tokens = scores.size(0), count = scores.size(1), top_k = experts.size(1);
  const auto settings = router_settings(count, top_k, 1, 1, normalize, scale);
  const float* grad = elements<float>(grad_weights, tokens * top_k, "grad_weights");
  const float* from = elements<float>(scores, tokens * count, "scores");
  const int32_t* ids = elements<int32_t>(experts, tokens * top_k, "experts");
  float* out = elements<float>(grad_logits, tokens * count, "grad_logits");
  torch::stable::parallel_for(0, tokens, kTokensAtATime, [&](int64_t begin, int64_t end) {
    nemocascade::moe_router::gradient(grad, from, ids, softmax, settings, begin, end, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "moe_choose(Tensor scores, Tensor? bias, Tensor? mask, Tensor? given, int top_k, int groups, "
      "int top_groups, bool normalize, float scale, Tensor(a!) experts, Tensor(b!) weights) -> ()");
  m.def(
      "moe_sort_slots(Tensor experts, int num_experts, Tensor(a!) counts, Tensor(b!) order, "
      "Tensor(c!) offsets, Tensor(d!) positions) -> ()");
  m.def(
      "moe_choose_gradient(Tensor grad_weights, Tensor scores, Tensor experts, bool softmax, "
      "bool normalize, float scale, Tensor(a!) grad_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("moe_choose", TORCH_BOX(&moe_choose));
  m.impl("moe_sort_slots", TORCH_BOX(&moe_sort_slots));
  m.impl("moe_choose_gradient", TORCH_BOX(&moe_choose_gradient));
}
