// A buffer of floats for code that is compiled for a level of the processor, see simd.h.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace nemocascade::NEMOCASCADE_LEVEL {
namespace {

// Uninitialised; null if `count` is 0.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : all_(count == 0 ? nullptr : new float[static_cast<size_t>(count)]) {}
  ~Buffer() { delete[] all_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  INLINE float* get() const { return all_; }

 private:
  float* all_;
};

}  // namespace
}  // namespace nemocascade::NEMOCASCADE_LEVEL
