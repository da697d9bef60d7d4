// The Mamba-2 mixer between its projections, on the CPU:
//
//   [x, B, C] = silu(conv1d([x, B, C]))
//   y = scan(x, softplus(dt + dt_bias), A, B, C, D)
//   out = group RMSNorm(y * silu(z)) * weight
//
// kernels/nemocascade_kernels/mamba2/reference.py defines it, and ssd.py explains how the scan
// becomes matrix products within chunks of 32 rows. Here a group of heads is computed through a
// whole document: its convolution, scan and norm are independent of other groups, and its state
// stays in the caches.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/tables.h"

namespace nemocascade::mamba2 {

// Rows of a chunk; the convolution reads no further back than the previous chunk.
constexpr int64_t kChunk = 32;
constexpr int64_t kLargestWindow = kChunk + 1;

struct Sizes {
  int64_t heads;
  int64_t head_dim;
  int64_t groups;
  int64_t state;
  int64_t window;  // K rows of the convolution
  float dt_low;
  float dt_high;
  float eps;

  int64_t ratio() const { return heads / groups; }
  int64_t inner() const { return heads * head_dim; }
  int64_t channels() const { return inner() + 2 * groups * state; }
  int64_t columns() const { return inner() + channels() + heads; }
};

// W = channels(). All are contiguous. The same struct holds the gradients, as sums in double.
template <typename T>
struct Parameters {
  T* conv_weight;  // [W, K]
  T* conv_bias;    // [W]
  T* dt_bias;      // [heads]
  T* A;            // [heads]
  T* D;            // [heads]
  T* norm_weight;  // [inner]
};

// Rows [begin, end) of the pack. Initial state, null for zeros: the convolution's inputs before the
// document, [K - 1, W], and the scan's state, [heads, head_dim, state]. The state after the last
// row is written to `final_state` unless it is null.
struct Document {
  int64_t begin;
  int64_t end;
  const float* inputs = nullptr;
  const float* state = nullptr;
  float* final_state = nullptr;
};

// A unit of work for a thread: a group of heads in some documents.
struct Task {
  const Document* documents;
  int64_t count;
  int64_t group;
};

// Writes the task's rows and columns of the output.
using Forward = void (*)(const Sizes& sizes, const Parameters<const float>& parameters,
                         const Task& task, const Rows& zxbcdt, const Rows& out);

// Writes the task's rows and columns of d_zxbcdt and adds to the group's elements of `sums`.
using Backward = void (*)(const Sizes& sizes, const Parameters<const float>& parameters,
                          const Task& task, const Rows& zxbcdt, const Rows& d_out,
                          const Rows& d_zxbcdt, const Parameters<double>& sums);

// forward.cpp and backward.cpp are compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(Forward, forward)
NEMOCASCADE_LEVELS_OF(Backward, backward)

}  // namespace nemocascade::mamba2
