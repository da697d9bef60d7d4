// Wrappers of CUDA's extensions to C++: shared memory and launches. The tests replace this file by
// a version that runs the same kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace nemocascade {

// The dynamic shared memory of the block.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ int4 words[];
  return reinterpret_cast<T*>(words);
}

// Enqueues a kernel. `shared` is in bytes.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
            cudaStream_t stream, Arguments... arguments) {
  kernel<<<blocks, threads, shared, stream>>>(arguments...);
}

}  // namespace nemocascade
