// Loops over rows of experts on the CPU, between their matrix products. A row's result does not
// depend on its position.
#pragma once

#include <cstdint>

#include "common/tables.h"

namespace nemocascade {

// Outputs of `activate_gradient` for a row i < count, with w = weights[slots[i]] and g the gradient
// of its unweighted activation.
struct ActivationGradient {
  float* active;  // [size, width]: w act(h)
  float* h;       // [size, U]: w act'(h) g, and zeros from `count` on
  float* dots;    // act(h) . g at slots[i]; null: not computed
};

struct ExpertRows {
  // out [size, hidden] = x[slots[i] / top_k] for i < count, and zeros.
  void (*gather)(const float* x, const int32_t* slots, int64_t top_k, int64_t hidden, int64_t count,
                 int64_t size, float* out);

  // active [rows, width] = relu(h)^2, or silu(gate) * up with h = [gate, up].
  void (*activate)(const float* h, bool swiglu, int64_t rows, int64_t width, float* active);

  void (*activate_gradient)(const float* h, const float* grad, const float* weights,
                            const int32_t* slots, bool swiglu, int64_t count, int64_t size,
                            int64_t width, const ActivationGradient& out);

  // out[t] = sum_k weights[t, k] * rows[positions[t, k]], in the order of k, for the tokens
  // [begin, end). Without weights they are 1. Positions from `filled` on are excluded.
  void (*combine)(const float* rows, const int32_t* positions, const float* weights, int64_t filled,
                  int64_t top_k, int64_t hidden, int64_t begin, int64_t end, float* out);
};

// expert_rows.cpp is compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(ExpertRows, expert_rows)

}  // namespace nemocascade
