#include "linear_logprob/rows.h"

#include <cmath>
#include <cstring>

#include "common/row_sums.h"

namespace nemocascade::linear_logprob::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

// gradient_j = -scale p_j (slope + entropy_slope (log p_j + entropy)), and + scale slope at target.
template <bool kEntropy, typename T>
INLINE void gradient_of_row(T* row, int64_t size, float scale, float lse, float slope,
                            float entropy, float entropy_slope) {
  const auto slope_of = [&](Floats logits) __attribute__((always_inline)) {
    const Floats log_p = logits * scale - lse;
    const Floats p = exponential(log_p);
    if constexpr (!kEntropy) return p * (-scale * slope);
    const Floats factor = (log_p + entropy) * entropy_slope + slope;
    return p == 0.0f ? fill(0.0f) : p * factor * -scale;
  };
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) {
      T* at = row + j + u * kLanes;
      store(at, slope_of(load(at)));
    }
  for (; j + kLanes <= size; j += kLanes) store(row + j, slope_of(load(row + j)));
  if (j < size) store_tail(row + j, size - j, slope_of(load_tail(row + j, size - j, 0.0f)));
}

template <typename T>
void statistics(const Logits<T>& logits, const int64_t* target, int64_t begin, int64_t end,
                const Statistics& out) {
  for (int64_t r = begin; r < end; ++r) {
    const T* row = logits.data + r * logits.stride;
    const float top = row_maximum(row, logits.vocabulary) * logits.scale;
    float weighted = 0.0f;
    if (out.weighted != nullptr) {
      row_sums<true, false>(row, logits.vocabulary, logits.scale, top, nullptr, out.total + r,
                            out.weighted + r);
    } else {
      row_sums<false, false>(row, logits.vocabulary, logits.scale, top, nullptr, out.total + r,
                             &weighted);
    }
    out.maximum[r] = top;
    const bool inside = target[r] >= 0 && target[r] < logits.vocabulary;
    out.target_logit[r] = inside ? widen(row[target[r]]) * logits.scale : kLowest;
  }
}

template <typename T>
void gradient(const Logits<T>& logits, const int64_t* target, int64_t begin, int64_t end,
              const Slopes& slopes) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = logits.data + r * logits.stride;
    const float slope = slopes.slope[r], lse = slopes.lse[r], scale = logits.scale;
    const float entropy_slope = slopes.entropy_slope == nullptr ? 0.0f : slopes.entropy_slope[r];
    if (slope == 0.0f && entropy_slope == 0.0f) {
      std::memset(row, 0, static_cast<size_t>(logits.vocabulary) * sizeof(T));
      continue;
    }
    const bool inside = target[r] >= 0 && target[r] < logits.vocabulary;
    const float at_target = inside ? widen(row[target[r]]) : 0.0f;
    if (entropy_slope == 0.0f) {
      gradient_of_row<false>(row, logits.vocabulary, scale, lse, slope, 0.0f, 0.0f);
    } else {
      gradient_of_row<true>(row, logits.vocabulary, scale, lse, slope, slopes.entropy[r],
                            entropy_slope);
    }
    if (inside) {
      // Recomputed instead of read back and added to: p may have been rounded.
      const float log_p = at_target * scale - lse;
      const float p = std::exp(log_p);
      const float factor =
          entropy_slope == 0.0f ? slope : (log_p + slopes.entropy[r]) * entropy_slope + slope;
      store_tail(row + target[r], 1, fill(scale * (slope - p * factor)));
    }
  }
}

}  // namespace

const RowKernels row_kernels = {statistics<float>, statistics<Bf16>, gradient<float>,
                                gradient<Bf16>};

}  // namespace nemocascade::linear_logprob::NEMOCASCADE_LEVEL
