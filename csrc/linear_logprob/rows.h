// Row kernels on logits for the CPU, between the matrix products of a policy loss.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/tables.h"

namespace nemocascade::linear_logprob {

// Outputs of `RowKernels::statistics`, one element a row. See RowStatistics in
// common/linear_head/statistics.py.
struct Statistics {
  float* maximum;
  float* total;
  float* target_logit;
  float* weighted;  // null: not computed
};

// Inputs of `RowKernels::gradient` for each row. entropy and entropy_slope may both be null.
struct Slopes {
  const float* lse;
  const float* slope;
  const float* entropy;
  const float* entropy_slope;
};

// For logits of float and of Bf16.
struct RowKernels {
  // Statistics of rows [begin, end). A target outside [0, vocabulary) has target_logit -inf.
  template <typename T>
  using StatisticsOf = void (*)(const Logits<T>& logits, const int64_t* target, int64_t begin,
                                int64_t end, const Statistics& out);
  StatisticsOf<float> statistics;
  StatisticsOf<Bf16> statistics_bf16;

  // Overwrites rows [begin, end) with the gradient of slope * logprob + entropy_slope * entropy. A
  // row whose slopes are both 0 becomes 0, even if it held NaN.
  template <typename T>
  using GradientOf = void (*)(const Logits<T>& logits, const int64_t* target, int64_t begin,
                              int64_t end, const Slopes& slopes);
  GradientOf<float> gradient;
  GradientOf<Bf16> gradient_bf16;
};

// rows.cpp is compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(RowKernels, row_kernels)

}  // namespace nemocascade::linear_logprob
