// The MoE router's CUDA source as it stands, compiled for the CPU, behind plain C functions.
#include "../../../csrc/moe_router/router.cu"

using nemocascade::RouterSettings;
using nemocascade::moe_router::RouteArguments;

extern "C" {

int64_t scratch(int64_t tokens, int32_t experts) {
  return nemocascade::moe_router::route_scratch(tokens, experts);
}

int64_t state_size(int32_t experts) { return nemocascade::moe_router::route_state(experts); }

// Seed of the order in which threads and blocks run.
void set_seed(uint32_t seed) { emulation::random.seed(seed); }

// Source line whose barriers do nothing; 0: none.
void skip_barrier(int line) { emulation::skipped_line = line; }

// Dynamic shared memory of a block that chooses, with `items` experts a lane, or sorts, with 0.
int64_t choose_bytes(int32_t experts, int32_t top_k, int32_t items) {
  return sizeof(int32_t) * nemocascade::moe_router::choose_shared(
                               RouterSettings{experts, top_k, 1, 1, false, 1.0f}, items);
}

// Both return CUDA's error code, 0 for success.
int route(const RouteArguments* arguments) {
  return nemocascade::moe_router::launch_route(*arguments, nullptr);
}

int route_gradient(const float* grad_weights, const void* logits, bool bfloat16, bool softmax,
                   const int32_t* experts, void* grad_logits, int64_t tokens,
                   const RouterSettings* settings) {
  return nemocascade::moe_router::launch_route_gradient(
      grad_weights, logits, bfloat16, softmax, experts, grad_logits, tokens, *settings, nullptr);
}
}
