#include "moe_router/router.h"

#include <algorithm>
#include <vector>

namespace nemocascade::moe_router {

void gradient(const float* grad_weights, const float* scores, const int32_t* experts, bool softmax,
              const RouterSettings& settings, int64_t begin, int64_t end, float* grad_logits) {
  const int32_t count = settings.experts, top_k = settings.top_k;
  std::vector<float> slopes(top_k);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = scores + t * count;
    const float* grad = grad_weights + t * top_k;
    const int32_t* chosen = experts + t * top_k;
    float* out = grad_logits + t * count;
    std::fill_n(out, count, 0.0f);
    // The scores of a token without experts are not read: they may be NaN.
    if (std::all_of(chosen, chosen + top_k, [&](int32_t e) { return e >= count; })) continue;
    // weights = scale * s / S with S = sum s + epsilon: d/ds_k = (g_k - sum_j g_j s_j / S) / S.
    float sum = kNormalizeEpsilon, inner = 0.0f;
    for (int32_t k = 0; k < top_k; ++k) {
      slopes[k] = chosen[k] < count ? grad[k] * settings.scale : 0.0f;
      if (chosen[k] < count) {
        sum += row[chosen[k]];
        inner += slopes[k] * row[chosen[k]];
      }
    }
    if (settings.normalize) {
      for (int32_t k = 0; k < top_k; ++k) slopes[k] = (slopes[k] - inner / sum) / sum;
    }
    float mean = 0.0f;
    for (int32_t k = 0; softmax && k < top_k; ++k) {
      if (chosen[k] < count) mean += slopes[k] * row[chosen[k]];
    }
    for (int32_t e = 0; softmax && e < count; ++e) out[e] = -row[e] * mean;
    for (int32_t k = 0; k < top_k; ++k) {
      if (chosen[k] >= count) continue;
      const float s = row[chosen[k]];
      out[chosen[k]] += slopes[k] * s * (softmax ? 1.0f : 1.0f - s);
    }
  }
}

}  // namespace nemocascade::moe_router
