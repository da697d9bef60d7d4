// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, on the CPU;
// nemocascade/megatron/layers/norm.py states it.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace nemocascade::rms_norm {

// The norm of some rows. Arithmetic is in float.
struct Norm {
  Rows x;
  const float* weight;  // [width]
  int64_t width;
  float eps;
};

// Writes rows [begin, end) of y.
using Forward = void(const Norm& norm, int64_t begin, int64_t end, const Rows& y);

// Writes rows [begin, end) of dx and the sum over them of the weight's gradient, [width].
using Backward = void(const Norm& norm, int64_t begin, int64_t end, const Rows& dy, const Rows& dx,
                      float* d_weight);

// rows.cpp is compiled once for each level of the processor: common/levels.h.
namespace level_base {
Forward forward;
Backward backward;
}  // namespace level_base
#ifdef NEMOCASCADE_X86_LEVELS
namespace level_v3 {
Forward forward;
Backward backward;
}  // namespace level_v3
namespace level_v4 {
Forward forward;
Backward backward;
}  // namespace level_v4
#endif

}  // namespace nemocascade::rms_norm
