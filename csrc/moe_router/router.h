// The MoE router on the CPU.
#pragma once

#include <cstdint>

#include "common/expert_choice.h"

namespace nemocascade::moe_router {

// Gradient [T, E] in the logits for the tokens [begin, end), from the gradient in the weights.
void gradient(const float* grad_weights, const float* scores, const int32_t* experts, bool softmax,
              const RouterSettings& settings, int64_t begin, int64_t end, float* grad_logits);

}  // namespace nemocascade::moe_router
