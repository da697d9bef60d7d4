// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, on the CPU;
// kernels/nemocascade_kernels/rms_norm/reference.py defines it.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/tables.h"

namespace nemocascade::rms_norm {

// The norm of some rows. Arithmetic is in float.
struct Norm {
  Rows x;
  const float* weight;  // [width]
  int64_t width;
  float eps;
};

struct Functions {
  // Writes rows [begin, end) of y.
  void (*forward)(const Norm& norm, int64_t begin, int64_t end, const Rows& y);

  // Writes rows [begin, end) of dx and the sum over them of the weight's gradient, [width].
  void (*backward)(const Norm& norm, int64_t begin, int64_t end, const Rows& dy, const Rows& dx,
                   float* d_weight);
};

// rows.cpp is compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(Functions, functions)

}  // namespace nemocascade::rms_norm
