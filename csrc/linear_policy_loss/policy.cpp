#include "linear_policy_loss/policy.h"

#include <cmath>
#include <cstring>

#include "common/buffer.h"
#include "common/row_sums.h"

namespace nemocascade::linear_policy_loss::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

constexpr float kNan = __builtin_nanf("");

struct Token {
  float loss, slope;
};

// Advantage and importance of distillation, as common/mopd.py defines them.
struct MopdTerms {
  float advantage, importance;
};

INLINE MopdTerms mopd_terms(float teacher_logprob, float train_logprob, float rollout_logprob,
                            float ratio_low, float ratio_high) {
  const float ratio = std::exp(train_logprob - rollout_logprob);
  const bool inside = ratio >= ratio_low && ratio <= ratio_high;
  return {teacher_logprob - train_logprob, inside ? ratio : 0.0f};
}

// (f, df / dlogprob) of one token.
INLINE Token evaluate(const Objective& objective, int64_t r, float logprob) {
  const float weight = objective.weight[r];
  switch (objective.kind) {
    case Kind::kNll:
      return {-weight * logprob, -weight};
    case Kind::kGrpo:
      return {-weight * objective.a[r] * logprob, -weight * objective.a[r]};
    case Kind::kGrpoKl: {
      const float difference = objective.b[r] - logprob, excess = std::expm1(difference);
      const float kl = objective.x * (excess - difference);
      // y is 1 if the penalty has an importance weight, whose gradient is added; else 0.
      const float kl_slope = objective.y != 0.0f ? -difference : -excess;
      return {weight * (kl - objective.a[r] * logprob),
              weight * (objective.x * kl_slope - objective.a[r])};
    }
    case Kind::kMopd: {
      const MopdTerms terms =
          mopd_terms(objective.a[r], logprob, objective.b[r], objective.x, objective.y);
      const float slope = -weight * terms.importance * terms.advantage;
      return {slope * logprob, slope};
    }
  }
  return {kNan, 0.0f};
}

template <typename T>
INLINE void scale_row(const float* kept, int64_t size, float factor, T* row) {
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kLanes;
      store(row + at, load(kept + at) * factor);
    }
  for (; j + kLanes <= size; j += kLanes) store(row + j, load(kept + j) * factor);
  if (j < size) store_tail(row + j, size - j, load(kept + j) * factor);
}

template <bool kEntropy, bool kGradient, typename T>
INLINE void rows(const Logits<T>& logits, const int64_t* target, int64_t begin, int64_t end,
                 const Objective& objective, float grad_scale, const Result& out) {
  const int64_t size = logits.vocabulary;
  const float scale = logits.scale;
  const Buffer kept(kGradient ? size + kLanes : 0);
  for (int64_t r = begin; r < end; ++r) {
    T* row = logits.data + r * logits.stride;
    const float top = row_maximum(row, size) * scale;
    float total, weighted;
    row_sums<kEntropy, kGradient>(row, size, scale, top, kept.get(), &total, &weighted);
    const bool inside = target[r] >= 0 && target[r] < size;
    const float log_total = std::log(total);
    const float logprob = inside ? widen(row[target[r]]) * scale - top - log_total : kNan;
    const Token token = evaluate(objective, r, logprob);
    out.loss[r] = token.loss;
    out.logprob[r] = logprob;
    out.entropy[r] = kEntropy ? log_total - weighted / total : 0.0f;
    if constexpr (kGradient) {
      const float slope = token.slope * grad_scale;
      if (slope == 0.0f) {
        std::memset(row, 0, static_cast<size_t>(size) * sizeof(T));
        continue;
      }
      scale_row(kept.get(), size, -scale * slope / total, row);
      // Recomputed instead of read back and added to: it may have been rounded.
      if (inside) store_tail(row + target[r], 1, fill(-scale * slope * std::expm1(logprob)));
    }
  }
}

template <typename T>
void rows_of(const Logits<T>& logits, const int64_t* target, int64_t begin, int64_t end,
             const Objective& objective, float grad_scale, bool entropy, bool gradient,
             const Result& out) {
  if (entropy && gradient) {
    rows<true, true>(logits, target, begin, end, objective, grad_scale, out);
  } else if (entropy) {
    rows<true, false>(logits, target, begin, end, objective, grad_scale, out);
  } else if (gradient) {
    rows<false, true>(logits, target, begin, end, objective, grad_scale, out);
  } else {
    rows<false, false>(logits, target, begin, end, objective, grad_scale, out);
  }
}

}  // namespace

const PolicyRows policy_rows = {rows_of<float>, rows_of<Bf16>};

}  // namespace nemocascade::linear_policy_loss::NEMOCASCADE_LEVEL
