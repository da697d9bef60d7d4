// A policy loss on rows of logits for the CPU: statistics, objective and gradient of a row at once.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/tables.h"

namespace nemocascade::linear_policy_loss {

// Objectives that the kernel knows. The numbers are those of linear_policy_loss/native.py.
enum class Kind : int64_t { kNll = 0, kGrpo = 1, kGrpoKl = 2, kMopd = 3 };

// f of a token: two per-token constants and two settings, like the twins of triton.py.
struct Objective {
  Kind kind;
  const float* weight;
  const float* a;
  const float* b;
  float x, y;
};

// Outputs, one element a row.
struct Result {
  float* loss;
  float* logprob;
  float* entropy;
};

// For logits of float and of Bf16.
//
// Loss, log-probability and entropy (0 if not requested) of rows [begin, end). If `gradient` is
// set, the logits become grad_scale times the gradient. A row whose slope is 0 becomes 0, even if
// it held NaN. A target outside [0, vocabulary) makes NaN.
struct PolicyRows {
  template <typename T>
  using Of = void (*)(const Logits<T>& logits, const int64_t* target, int64_t begin, int64_t end,
                      const Objective& objective, float grad_scale, bool entropy, bool gradient,
                      const Result& out);
  Of<float> rows;
  Of<Bf16> rows_bf16;
};

// policy.cpp is compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(PolicyRows, policy_rows)

}  // namespace nemocascade::linear_policy_loss
