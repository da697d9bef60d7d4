#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "moe_router/router_cuda.h"

namespace {

using namespace nemocascade::moe_router;
using nemocascade::cuda_elements;
using nemocascade::is_bf16;
using nemocascade::RouterSettings;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  return static_cast<cudaStream_t>(nemocascade::current_cuda_stream(tensor));
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess,
                  "the MoE router's kernels could not be launched: ", cudaGetErrorString(error));
}

RouterSettings settings_of(int64_t experts, int64_t most_experts, int64_t top_k, int64_t groups,
                           int64_t top_groups, bool normalize, double scale) {
  STD_TORCH_CHECK(experts >= 1 && experts <= most_experts, "experts(", experts,
                  ") must be at most ", most_experts, ": use backend='triton'");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= kMostChoices && groups <= kMostGroups, "top_k(", top_k,
                  ") and groups(", groups, ") must be at most 32: use backend='triton'");
  return nemocascade::router_settings(experts, top_k, groups, top_groups, normalize, scale);
}

// Data of logits, float32 or bfloat16, and of a gradient in their dtype.
void* logits_data(const Tensor& tensor, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "logits must be float32 or bfloat16");
  return nemocascade::checked_data(tensor, true, type, count, name);
}

int64_t moe_route_scratch(int64_t tokens, int64_t experts) {
  return route_scratch(tokens, static_cast<int32_t>(experts));
}

int64_t moe_route_state(int64_t experts) { return route_state(static_cast<int32_t>(experts)); }

void moe_route(const std::optional<Tensor>& logits, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, const std::optional<Tensor>& given,
               int64_t num_experts, bool softmax, int64_t groups, int64_t top_groups,
               bool normalize, double scale, Tensor weights, Tensor experts, Tensor scratch,
               Tensor state, Tensor counts, Tensor order, Tensor offsets, Tensor positions) {
  const int64_t tokens = experts.size(0), top_k = experts.size(1), slots = tokens * top_k;
  STD_TORCH_CHECK(slots < (int64_t{1} << 31), "tokens x top_k = ", slots, " must be below 2^31");
  STD_TORCH_CHECK(logits.has_value() || given.has_value(), "logits or given experts are needed");
  RouteArguments arguments{};
  arguments.settings = settings_of(num_experts, logits.has_value() ? kMostExperts : kMostSorted,
                                   top_k, groups, top_groups, normalize, scale);
  if (logits.has_value()) {
    arguments.bfloat16 = is_bf16(*logits);
    arguments.logits = logits_data(*logits, logits->scalar_type(), tokens * num_experts, "logits");
  }
  arguments.softmax = softmax;
  arguments.bias = cuda_elements<float>(bias, num_experts, "bias");
  arguments.mask = reinterpret_cast<const uint8_t*>(cuda_elements<bool>(mask, tokens, "mask"));
  arguments.given = cuda_elements<int32_t>(given, slots, "given");
  arguments.weights = cuda_elements<float>(weights, slots, "weights");
  arguments.experts = cuda_elements<int32_t>(experts, slots, "experts");
  arguments.loads =
      cuda_elements<int32_t>(scratch, moe_route_scratch(tokens, num_experts), "scratch");
  arguments.state =
      cuda_elements<int32_t>(state, route_state(static_cast<int32_t>(num_experts)), "state");
  arguments.tokens = tokens;
  arguments.sorted = {cuda_elements<int32_t>(counts, num_experts, "counts"),
                      cuda_elements<int32_t>(order, slots, "order"),
                      cuda_elements<int32_t>(offsets, num_experts + 1, "offsets"),
                      cuda_elements<int32_t>(positions, slots, "positions")};
  const torch::stable::accelerator::DeviceGuard guard(experts.get_device_index());
  check_launch(launch_route(arguments, current_stream(experts)));
}

void moe_route_gradient(const Tensor& grad_weights, const Tensor& logits, const Tensor& experts,
                        bool softmax, bool normalize, double scale, Tensor grad_logits) {
  const int64_t tokens = logits.size(0), count = logits.size(1), top_k = experts.size(1);
  const RouterSettings settings = settings_of(count, kMostExperts, top_k, 1, 1, normalize, scale);
  const ScalarType type = logits.scalar_type();
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(
      launch_route_gradient(cuda_elements<float>(grad_weights, tokens * top_k, "grad_weights"),
                            logits_data(logits, type, tokens * count, "logits"), is_bf16(logits),
                            softmax, cuda_elements<int32_t>(experts, tokens * top_k, "experts"),
                            logits_data(grad_logits, type, tokens * count, "grad_logits"), tokens,
                            settings, current_stream(logits)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def("moe_route_scratch(int tokens, int experts) -> int");
  m.def("moe_route_state(int experts) -> int");
  m.def(
      "moe_route(Tensor? logits, Tensor? bias, Tensor? mask, Tensor? given, int num_experts, "
      "bool softmax, int groups, int top_groups, bool normalize, float scale, Tensor(a!) weights, "
      "Tensor(b!) experts, Tensor(c!) scratch, Tensor(d!) state, Tensor(e!) counts, "
      "Tensor(f!) order, Tensor(g!) offsets, Tensor(h!) positions) -> ()");
  m.def(
      "moe_route_gradient(Tensor grad_weights, Tensor logits, Tensor experts, bool softmax, "
      "bool normalize, float scale, Tensor(a!) grad_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CompositeExplicitAutograd, m) {
  m.impl("moe_route_scratch", TORCH_BOX(&moe_route_scratch));
  m.impl("moe_route_state", TORCH_BOX(&moe_route_state));
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_gradient", TORCH_BOX(&moe_route_gradient));
}
