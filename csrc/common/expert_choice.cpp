#include "common/expert_choice.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

// The compiler makes a version of the loops for each level of x86-64; one is selected at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace nemocascade {
namespace {

// A value below every key.
constexpr int64_t kNone = std::numeric_limits<int64_t>::min();

// Maps floats to integers of the same order; a NaN is above all, and -0 equals 0.
INLINE int32_t ordered(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);
  const int32_t key = bits < 0 ? bits ^ 0x7fffffff : bits;
  return value != value ? std::numeric_limits<int32_t>::max() : key;
}

// Keys are compared this many at a time: one AVX-512 register, two of AVX2.
constexpr int32_t kLanes = 8;
typedef int64_t Keys __attribute__((vector_size(kLanes * sizeof(int64_t))));

// Number of vectors that hold n keys.
constexpr int32_t vectors(int32_t n) { return (n + kLanes - 1) / kLanes; }

// Computes unique keys of n values: among equal values the lower id has the larger key. `keys` has
// vectors(n) * kLanes elements; those past n are below every key.
INLINE void make_keys(const float* values, int32_t n, int64_t* keys) {
  for (int32_t i = 0; i < n; ++i) {
    keys[i] = (static_cast<int64_t>(ordered(values[i])) << 32) | (n - 1 - i);
  }
  std::fill(keys + n, keys + vectors(n) * kLanes, kNone);
}

// Ids of the largest keys, largest first. Each takes a pass over all keys, without a branch that
// depends on them.
INLINE void largest(const int64_t* keys, int32_t n, int32_t count, int32_t* ids) {
  const Keys none = Keys{} + kNone;
  int64_t last = std::numeric_limits<int64_t>::max();
  for (int32_t k = 0; k < count; ++k) {
    Keys best = none;
    for (int32_t v = 0; v < vectors(n); ++v) {
      Keys next;
      std::memcpy(&next, keys + v * kLanes, sizeof(next));
      next = next < last ? next : none;
      best = best > next ? best : next;
    }
    last = best[0];
    for (int32_t lane = 1; lane < kLanes; ++lane) last = std::max<int64_t>(last, best[lane]);
    ids[k] = n - 1 - static_cast<int32_t>(last & 0xffffffff);
  }
}

INLINE float group_score(const float* biased, int32_t size) {
  float first = -std::numeric_limits<float>::infinity();
  float second = first;
  for (int32_t e = 0; e < size; ++e) {
    const bool above = ordered(biased[e]) > ordered(first);
    const float loser = above ? first : biased[e];
    first = above ? biased[e] : first;
    second = ordered(loser) > ordered(second) ? loser : second;
  }
  return size < kScoresPerGroup ? first : first + second;
}

INLINE void weigh(const float* scores, const int32_t* chosen, const RouterSettings& settings,
                  float* weights) {
  float sum = 0.0f;
  for (int32_t k = 0; k < settings.top_k; ++k) {
    weights[k] = chosen[k] < settings.experts ? scores[chosen[k]] : 0.0f;
    sum += weights[k];
  }
  const float divisor = settings.normalize ? sum + kNormalizeEpsilon : 1.0f;
  for (int32_t k = 0; k < settings.top_k; ++k) weights[k] = weights[k] / divisor * settings.scale;
}

// Excludes the experts outside the token's best groups.
INLINE void keep_best_groups(const float* biased, const RouterSettings& settings,
                             float* group_scores, int64_t* group_keys, int32_t* kept,
                             int64_t* keys) {
  const int32_t groups = settings.groups, size = settings.experts / groups;
  for (int32_t g = 0; g < groups; ++g) group_scores[g] = group_score(biased + g * size, size);
  make_keys(group_scores, groups, group_keys);
  largest(group_keys, groups, settings.top_groups, kept);
  const int64_t lowest = group_keys[kept[settings.top_groups - 1]];
  for (int32_t g = 0; g < groups; ++g) {
    if (group_keys[g] < lowest) std::fill_n(keys + g * size, size, kNone);
  }
}

}  // namespace

FOR_EACH_CPU
void choose_experts(const float* scores, const float* bias, const bool* mask, const int32_t* given,
                    const RouterSettings& settings, int64_t begin, int64_t end, int32_t* experts,
                    float* weights) {
  const int32_t count = settings.experts, top_k = settings.top_k;
  const std::vector<float> no_bias(bias == nullptr ? count : 0, 0.0f);
  const float* added = bias == nullptr ? no_bias.data() : bias;
  std::vector<float> biased(count), group_scores(settings.groups);
  std::vector<int64_t> keys(vectors(count) * kLanes);
  std::vector<int64_t> group_keys(vectors(settings.groups) * kLanes);
  std::vector<int32_t> kept(settings.top_groups);
  for (int64_t t = begin; t < end; ++t) {
    const float* row = scores + t * count;
    int32_t* chosen = experts + t * top_k;
    if (mask != nullptr && !mask[t]) {
      std::fill_n(chosen, top_k, count);
    } else if (given != nullptr) {
      std::copy_n(given + t * top_k, top_k, chosen);
    } else {
      for (int32_t e = 0; e < count; ++e) biased[e] = row[e] + added[e];
      make_keys(biased.data(), count, keys.data());
      if (settings.groups > 1) {
        keep_best_groups(biased.data(), settings, group_scores.data(), group_keys.data(),
                         kept.data(), keys.data());
      }
      largest(keys.data(), count, top_k, chosen);
    }
    weigh(row, chosen, settings, weights + t * top_k);
  }
}

void sort_slots(const int32_t* experts, int64_t slots, int32_t num_experts, const Sorted& sorted) {
  std::vector<int32_t> next(num_experts + 1, 0);
  for (int64_t i = 0; i < slots; ++i) ++next[experts[i]];
  int32_t start = 0;
  for (int32_t e = 0; e <= num_experts; ++e) {
    if (e < num_experts) sorted.counts[e] = next[e];
    sorted.offsets[e] = start;
    start += std::exchange(next[e], start);
  }
  for (int64_t i = 0; i < slots; ++i) {
    const int32_t position = next[experts[i]]++;
    sorted.positions[i] = position;
    sorted.order[position] = static_cast<int32_t>(i);
  }
}

}  // namespace nemocascade
