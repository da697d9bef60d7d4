// The choices sorted by expert; shared by the CPU and the CUDA implementation.
#pragma once

#include <cstdint>

namespace nemocascade::moe_router {

// See `Routing` in nemocascade_kernels/common/routing.py.
struct Sorted {
  int32_t* counts;     // [E]
  int32_t* order;      // [T * K]
  int32_t* offsets;    // [E + 1]
  int32_t* positions;  // [T * K]
};

}  // namespace nemocascade::moe_router
