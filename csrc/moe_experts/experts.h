// The routed experts on the CPU, in float32: forward and all gradients.
//
// Slots (token, choice) are sorted by expert and split into segments: rows of one expert that are
// multiplied at once. A segment's rows are gathered, multiplied, activated and multiplied again
// while they are in the cache; no permuted copy is saved. Threads take one segment after the other.
// Each calls the matrix library on its own, so no product waits for another thread.
#pragma once

#include <cstdint>
#include <functional>

namespace nemocascade::moe_experts {

// Rows [first, first + count) of the sorted slots, all of one expert. The products run over `size`
// rows, padded with zeros, because the size determines the library's kernel. Only the last segment
// of an expert may have count < size.
struct Segment {
  int64_t expert, first, count, size;
};

// Shapes: T tokens, K choices a token, S = T * K slots, E experts, H hidden, I width,
// U = I (relu2) or 2 I (SwiGLU: gate rows, then up rows).
struct Experts {
  int64_t tokens, top_k, hidden, width;
  bool swiglu;
  const float* w_up;         // [E, U, H]
  const float* w_down;       // [E, H, I]
  const float* weights;      // [S], by slot
  const int32_t* order;      // [S] slots sorted by expert
  const int32_t* positions;  // [S], the inverse of order
  const Segment* segments;   // in the order of their slots; all slots with an expert
  int64_t num_segments;

  int64_t up() const { return swiglu ? 2 * width : width; }
  // Number of slots with an expert.
  int64_t filled() const {
    return num_segments == 0 ? 0
                             : segments[num_segments - 1].first + segments[num_segments - 1].count;
  }
};

// Calls a task for each index below `count`, on any thread. Every thread has its own scratch.
using Task = std::function<void(int64_t index, float* scratch)>;
using Parallel = std::function<void(int64_t count, int64_t scratch_floats, const Task& task)>;

// x [T, H]; h [filled, U] or null: pre-activations that the backward needs; rows [S, H] is scratch;
// y [T, H].
void forward(const Experts& experts, const float* x, float* h, float* rows, float* y,
             const Parallel& parallel);

// Null gradients are not computed. rows [S, H] is scratch, needed with x [T, H]. weights [S] holds
// zeros and is written where there is an expert. up and down have the shapes of the weights and are
// added to.
struct Gradients {
  float* rows;
  float* x;
  float* weights;
  float* up;
  float* down;
};

// grad [T, H] of y; x and h as in the forward. `window` bounds the rows with intermediate results
// in memory, `threads` the splits of a weight's gradient. Every sum has a fixed order.
void backward(const Experts& experts, const float* grad, const float* x, const float* h,
              const Gradients& gradients, int64_t window, int64_t threads,
              const Parallel& parallel);

}  // namespace nemocascade::moe_experts
