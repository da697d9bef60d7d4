// A divergence between the distributions of two rows of logits for the CPU, with its gradient.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/tables.h"

namespace nemocascade::linear_distill_loss {

// Divergences of the student's p from the teacher's q. The numbers are those of
// linear_distill_loss/native.py.
enum class Kind : int64_t { kReverseKl = 0, kForwardKl = 1, kJensenShannon = 2 };

// Outputs, one element a row: the divergence and both log-sum-exps.
struct Result {
  float* divergence;
  float* lse;
  float* teacher_lse;
};

// For logits of float and of Bf16.
//
// Divergences of rows [begin, end) of the student's logits from the teacher's, which have the same
// vocabulary and scale. If `gradient` is set, the student's logits become slope times the gradient.
// A row whose slope is 0 becomes 0, even if it held NaN, and its outputs are 0.
struct DivergenceRows {
  template <typename T>
  using Of = void (*)(const Logits<T>& logits, const Logits<T>& teacher, int64_t begin, int64_t end,
                      Kind kind, const float* slope, bool gradient, const Result& out);
  Of<float> rows;
  Of<Bf16> rows_bf16;
};

// divergence.cpp is compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(DivergenceRows, divergence_rows)

}  // namespace nemocascade::linear_distill_loss
