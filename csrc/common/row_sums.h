// The reduction of a row of logits, shared by the row kernels of a linear head.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace nemocascade::NEMOCASCADE_LEVEL {
namespace {

// Sums of e = exp(x - top), and of e (x - top) if kWeighted; x = scale * logit. If kKeep, e is
// written to `kept`, of whole vectors: the gradient then needs no second exponential.
template <bool kWeighted, bool kKeep, typename T>
INLINE void row_sums(const T* row, int64_t size, float scale, float top, float* kept, float* total,
                     float* weighted) {
  Floats totals[kUnroll] = {}, products[kUnroll] = {};
  const auto add = [&](Floats logits, int64_t at, int64_t u) __attribute__((always_inline)) {
    const Floats x = logits * scale - top;
    const Floats e = exponential(x);
    totals[u] += e;
    // 0 * -inf, beyond the row's end, must be 0.
    if constexpr (kWeighted) products[u] += e == 0.0f ? fill(0.0f) : e * x;
    if constexpr (kKeep) store(kept + at, e);
  };
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) add(load(row + j + u * kLanes), j + u * kLanes, u);
  for (; j + kLanes <= size; j += kLanes) add(load(row + j), j, 0);
  if (j < size) add(load_tail(row + j, size - j, kLowest), j, 0);
  for (int64_t u = 1; u < kUnroll; ++u) {
    totals[0] += totals[u];
    products[0] += products[u];
  }
  *total = sum(totals[0]);
  *weighted = sum(products[0]);
}

}  // namespace
}  // namespace nemocascade::NEMOCASCADE_LEVEL
