// The logits of a linear head, input of the row kernels for the CPU.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace nemocascade {

// The logits of some rows. Element (r, j) is at data[r * stride + j]; x = scale * logit.
template <typename T>
struct Logits {
  T* data;
  int64_t stride;
  int64_t vocabulary;
  float scale;
};

}  // namespace nemocascade
