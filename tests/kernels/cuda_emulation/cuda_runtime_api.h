// The part of CUDA's host API that launches use, on the CPU.
#pragma once

#include <cstddef>
#include <cstring>
#include <map>
#include <utility>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {

// Dynamic shared memory of a block, in bytes: without an attribute, and at most (sm_90).
constexpr size_t kShared = 48 << 10, kMostShared = 227 << 10;

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> allowed_shared;

inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace emulation

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emulation::kMostShared) {
    return emulation::record(cudaErrorInvalidValue);
  }
  emulation::allowed_shared[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
