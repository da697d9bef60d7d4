// The choice of a token's experts and the sort by expert: inputs and outputs of all
// implementations, and the functions for the CPU.
#pragma once

#include <cstdint>

namespace nemocascade {

// The score of a group is the sum of this many of its best biased scores.
constexpr int kScoresPerGroup = 2;
// Added to the sum of the chosen scores before the division.
constexpr float kNormalizeEpsilon = 1e-20f;

struct RouterSettings {
  int32_t experts;     // E
  int32_t top_k;       // K
  int32_t groups;      // number of equal groups of experts
  int32_t top_groups;  // maximum number of groups for a token
  bool normalize;      // divide the chosen scores by their sum
  float scale;         // factor on the weights
};

// Makes the settings from an operator's arguments.
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
//   scores [T, E]; bias [E] or null; mask [T] or null: 0 for a token without experts;
//   given [T, K] or null: these experts instead of a choice.
// Writes experts [T, K] (E means none) and weights [T, K].
void choose_experts(const float* scores, const float* bias, const bool* mask, const int32_t* given,
                    const RouterSettings& settings, int64_t begin, int64_t end, int32_t* experts,
                    float* weights);

// The choices sorted by expert; see `Routing` in nemocascade_kernels/common/routing.py.
struct Sorted {
  int32_t* counts;     // [E]
  int32_t* order;      // [T * K]
  int32_t* offsets;    // [E + 1]
  int32_t* positions;  // [T * K]
};

// Sorts slots by expert with a stable counting sort; the id E means no expert and sorts last.
void sort_slots(const int32_t* experts, int64_t slots, int32_t num_experts, const Sorted& sorted);

}  // namespace nemocascade
