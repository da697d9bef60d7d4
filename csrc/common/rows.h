// Matrices in memory, float32 or bfloat16.
#pragma once

#include <cstdint>

namespace nemocascade {

// Bits of a bfloat16.
enum class Bf16 : uint16_t {};

// Rows of float32 or, if `is_bf16` is set, bfloat16. Element (t, j) is number t * stride + j.
struct Rows {
  void* data;
  int64_t stride;
  bool is_bf16;
};

}  // namespace nemocascade
