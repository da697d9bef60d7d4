// The choice of a token's experts: settings of every implementation, and the choice on the CPU.
#pragma once

#include <cstdint>

namespace nemocascade {

// A group is judged by the sum of this many of its best biased scores.
constexpr int kScoresPerGroup = 2;
// Added to the sum of the chosen scores before the division.
constexpr float kNormalizeEpsilon = 1e-20f;

struct RouterSettings {
  int32_t experts;     // E
  int32_t top_k;       // K
  int32_t groups;      // groups of equal size that the experts form
  int32_t top_groups;  // how many of them a token may use
  bool normalize;      // divide the chosen scores by their sum
  float scale;         // factor on the weights
};

// The settings of an operator's arguments.
inline RouterSettings router_settings(int64_t experts, int64_t top_k, int64_t groups,
                                      int64_t top_groups, bool normalize, double scale) {
  return {static_cast<int32_t>(experts),
          static_cast<int32_t>(top_k),
          static_cast<int32_t>(groups),
          static_cast<int32_t>(top_groups),
          normalize,
          static_cast<float>(scale)};
}

// Chooses K experts for the tokens [begin, end).
//   scores [T, E]; bias [E] or null; mask [T] or null: 0 for a token that goes to no expert;
//   given [T, K] or null: these experts instead of a choice.
// Writes experts [T, K] (E where there is none) and weights [T, K].
void choose_experts(const float* scores, const float* bias, const bool* mask, const int32_t* given,
                    const RouterSettings& settings, int64_t begin, int64_t end, int32_t* experts,
                    float* weights);

}  // namespace nemocascade
