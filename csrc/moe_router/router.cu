#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "moe_router/router_cuda.h"
#include "moe_router/router_kernels.cuh"

namespace nemocascade::moe_router {
namespace {

static_assert(kMostChoices == kLanes && kMostGroups == kLanes);

// Bytes of dynamic shared memory that a kernel may have unless an attribute allows it more.
constexpr size_t kSharedWithoutAttribute = 48 << 10;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens of a block: as few as kMostBlocks allows, so that even small batches fill the device.
int32_t tokens_of_block(int64_t tokens) {
  const int64_t tiles = ceil_div(tokens, int64_t{kTileTokens} * kMostBlocks);
  return static_cast<int32_t>(std::max<int64_t>(tiles, 1) * kTileTokens);
}

int64_t blocks_of(int64_t tokens) {
  return std::max<int64_t>(1, ceil_div(tokens, tokens_of_block(tokens)));
}

template <int kValue>
using Items = std::integral_constant<int, kValue>;

// Calls f with the logits' type, the number of elements of a lane, and true for softmax scores.
template <typename F>
void dispatch(bool bfloat16, bool softmax, int32_t experts, const F& f) {
  const auto with_items = [&](auto scalar, auto is_softmax) {
    if (experts <= kLanes) return f(scalar, Items<1>{}, is_softmax);
    if (experts <= 4 * kLanes) return f(scalar, Items<4>{}, is_softmax);
    if (experts <= 8 * kLanes) return f(scalar, Items<8>{}, is_softmax);
    return f(scalar, Items<kMostExperts / kLanes>{}, is_softmax);
  };
  const auto with_score = [&](auto scalar) {
    if (softmax) return with_items(scalar, std::true_type{});
    return with_items(scalar, std::false_type{});
  };
  if (bfloat16) return with_score(Bf16{});
  return with_score(float{});
}

}  // namespace

int64_t route_scratch(int64_t tokens, int32_t experts) { return blocks_of(tokens) * (experts + 1); }

int64_t route_state(int32_t experts) { return kCounters + experts; }

cudaError_t launch_route(const RouteArguments& arguments, cudaStream_t stream) {
  const RouterSettings& settings = arguments.settings;
  const int32_t experts = settings.experts;
  const int64_t slots = arguments.tokens * settings.top_k;
  const int32_t choosers = static_cast<int32_t>(blocks_of(arguments.tokens));
  const int32_t scanners = static_cast<int32_t>(ceil_div(experts + 1, kScanExperts));
  const int32_t blocks = choosers + scanners + static_cast<int32_t>(ceil_div(slots, kPlaced));
  const Sorted& sorted = arguments.sorted;
  const RouteKernelArguments route{arguments.logits,
                                   arguments.bias,
                                   arguments.mask,
                                   arguments.given,
                                   arguments.weights,
                                   arguments.experts,
                                   sorted.positions,
                                   arguments.loads,
                                   arguments.state,
                                   sorted.counts,
                                   sorted.offsets,
                                   sorted.order,
                                   arguments.tokens,
                                   tokens_of_block(arguments.tokens),
                                   choosers,
                                   scanners,
                                   blocks,
                                   settings};
  dispatch(arguments.bfloat16, arguments.softmax, experts,
           [&](auto scalar, auto items, auto softmax) {
             const auto kernel = route_kernel<decltype(scalar), items.value, softmax.value>;
             const int keys_of_lane = arguments.logits == nullptr ? 0 : items.value;
             const size_t shared = sizeof(int32_t) * choose_shared(settings, keys_of_lane);
             if (shared > kSharedWithoutAttribute) {
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared));
             }
             launch(kernel, static_cast<unsigned>(blocks), kThreads, shared, stream, route);
           });
  return cudaGetLastError();
}

cudaError_t launch_route_gradient(const float* grad_weights, const void* logits, bool bfloat16,
                                  bool softmax, const int32_t* experts, void* grad_logits,
                                  int64_t tokens, const RouterSettings& settings,
                                  cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(ceil_div(tokens, kWarps));
  const GradientArguments arguments{grad_weights, logits, experts, grad_logits, tokens, settings};
  dispatch(bfloat16, softmax, settings.experts, [&](auto scalar, auto items, auto is_softmax) {
    launch(gradient_kernel<decltype(scalar), items.value, is_softmax.value>, blocks, kThreads, 0,
           stream, arguments);
  });
  return cudaGetLastError();
}

}  // namespace nemocascade::moe_router
