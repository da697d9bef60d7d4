// The MoE router's CUDA source as it stands, compiled for the CPU, behind plain C functions.
#include "../../../csrc/moe_router/router.cu"

using nemocascade::RouterSettings;
using nemocascade::moe_router::RouteArguments;

extern "C" {

int64_t scratch(int64_t tokens, int32_t experts) {
  return nemocascade::moe_router::route_scratch(tokens, experts);
}

void route(const RouteArguments* arguments) {
  nemocascade::moe_router::launch_route(*arguments, nullptr);
}

void route_gradient(const float* grad_weights, const void* logits, bool bfloat16, bool softmax,
                    const int32_t* experts, void* grad_logits, int64_t tokens,
                    const RouterSettings* settings) {
  nemocascade::moe_router::launch_route_gradient(grad_weights, logits, bfloat16, softmax, experts,
                                                 grad_logits, tokens, *settings, nullptr);
}
}
