#include "moe_experts/experts.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/blas.h"
#include "common/expert_rows.h"
#include "common/levels.h"

namespace nemocascade::moe_experts {
namespace {

using blas::add_outer;
using blas::multiply;

// Tokens whose rows a thread sums at a time.
constexpr int64_t kTokensAtATime = 64;
// A weight's gradient is split into blocks of a multiple of this many rows.
constexpr int64_t kBlockRows = 32;

const ExpertRows& loops() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade, expert_rows);
  return best;
}

int64_t largest_size(const Experts& experts) {
  int64_t size = 0;
  for (int64_t i = 0; i < experts.num_segments; ++i)
    size = std::max(size, experts.segments[i].size);
  return size;
}

// A product into `out`, of which only `count` rows may be written; `scratch` holds all rows.
void multiply_into(const float* x, const float* weight, bool transposed, const Segment& segment,
                   int64_t k, int64_t n, float* scratch, float* out) {
  const bool exact = segment.count == segment.size;
  multiply(x, weight, transposed, segment.size, k, n, exact ? out : scratch);
  if (!exact) std::copy_n(scratch, segment.count * n, out);
}

void combine_all(const Experts& experts, const float* rows, const float* weights, float* out,
                 const Parallel& parallel) {
  const int64_t blocks = (experts.tokens + kTokensAtATime - 1) / kTokensAtATime;
  parallel(blocks, 0, [&](int64_t block, float*) {
    const int64_t begin = block * kTokensAtATime;
    loops().combine(rows, experts.positions, weights, experts.filled(), experts.top_k,
                    experts.hidden, begin, std::min(begin + kTokensAtATime, experts.tokens), out);
  });
}

// Consecutive segments, and the offset of each in the buffers of intermediate results.
struct Window {
  int64_t first_segment, end_segment;
  std::vector<int64_t> starts;
  int64_t rows = 0;
};

std::vector<Window> windows_of(const Experts& experts, int64_t limit) {
  std::vector<Window> windows;
  for (int64_t i = 0; i < experts.num_segments; ++i) {
    const int64_t size = experts.segments[i].size;
    if (windows.empty() || windows.back().rows + size > limit) windows.push_back({i, i, {}, 0});
    Window& window = windows.back();
    window.starts.push_back(window.rows);
    window.rows += size;
    window.end_segment = i + 1;
  }
  return windows;
}

// Rows of a window: gathered x and gradient, and the factors of the weights' gradients.
struct Buffers {
  float *x, *grad, *active, *grad_h;
};

// A block of rows of one weight's gradient: `left^T right` over the segments of one expert.
struct Block {
  int64_t first_segment, end_segment;
  bool up;
  int64_t begin, end;
};

class Backward {
 public:
  Backward(const Experts& experts, const float* grad, const float* x, const float* h,
           const Gradients& gradients)
      : experts_(experts), grad_(grad), x_(x), h_(h), gradients_(gradients) {}

  // Computes everything for one segment except the weights' gradients.
  void compute_segment(const Window& window, int64_t index, const Buffers& buffers,
                       float* scratch) const {
    const Segment& segment = experts_.segments[index];
    const int64_t start = window.starts[index - window.first_segment];
    const int64_t hidden = experts_.hidden, width = experts_.width, up = experts_.up();
    const int32_t* slots = experts_.order + segment.first;
    float* grad = buffers.grad + start * hidden;
    float* grad_h = buffers.grad_h + start * up;
    loops().gather(grad_, slots, experts_.top_k, hidden, segment.count, segment.size, grad);
    multiply(grad, experts_.w_down + segment.expert * hidden * width, false, segment.size, hidden,
             width, scratch);
    loops().activate_gradient(h_ + segment.first * up, scratch, experts_.weights, slots,
                              experts_.swiglu, segment.count, segment.size, width,
                              {buffers.active + start * width, grad_h, gradients_.weights});
    if (gradients_.rows != nullptr) {
      multiply_into(grad_h, experts_.w_up + segment.expert * up * hidden, false, segment, up,
                    hidden, scratch, gradients_.rows + segment.first * hidden);
    }
    if (gradients_.up != nullptr) {
      loops().gather(x_, slots, experts_.top_k, hidden, segment.count, segment.count,
                     buffers.x + start * hidden);
    }
  }

  // The blocks of a window's weight gradients: at least two a thread, to balance the load.
  std::vector<Block> blocks(const Window& window, int64_t threads) const {
    std::vector<Block> whole;
    for (int64_t i = window.first_segment; i < window.end_segment;) {
      int64_t end = i + 1;
      while (end < window.end_segment &&
             experts_.segments[end].expert == experts_.segments[i].expert) {
        ++end;
      }
      if (gradients_.down != nullptr) whole.push_back({i, end, false, 0, experts_.hidden});
      if (gradients_.up != nullptr) whole.push_back({i, end, true, 0, experts_.up()});
      i = end;
    }
    const int64_t wanted = 2 * threads, count = static_cast<int64_t>(whole.size());
    const int64_t cuts = count == 0 ? 1 : (wanted + count - 1) / count;
    std::vector<Block> cut;
    for (const Block& block : whole) {
      const int64_t even = (block.end + cuts - 1) / cuts;
      const int64_t rows = (even + kBlockRows - 1) / kBlockRows * kBlockRows;
      for (int64_t begin = 0; begin < block.end; begin += rows) {
        cut.push_back({block.first_segment, block.end_segment, block.up, begin,
                       std::min(begin + rows, block.end)});
      }
    }
    return cut;
  }

  void weight_gradient(const Window& window, const Block& block, const Buffers& buffers) const {
    const int64_t hidden = experts_.hidden, width = experts_.width, up = experts_.up();
    const int64_t left_width = block.up ? up : hidden, right_width = block.up ? hidden : width;
    const float* lefts = block.up ? buffers.grad_h : buffers.grad;
    const float* rights = block.up ? buffers.x : buffers.active;
    float* out =
        (block.up ? gradients_.up : gradients_.down) +
        (experts_.segments[block.first_segment].expert * left_width + block.begin) * right_width;
    // Only an expert's last segment holds fewer rows than its size: the rows are contiguous.
    const int64_t first = window.starts[block.first_segment - window.first_segment];
    const int64_t last = block.end_segment - 1;
    const int64_t rows =
        window.starts[last - window.first_segment] - first + experts_.segments[last].count;
    add_outer({lefts + first * left_width + block.begin, left_width},
              {rights + first * right_width, right_width}, rows, block.end - block.begin,
              right_width, out);
  }

 private:
  const Experts& experts_;
  const float *grad_, *x_, *h_;
  const Gradients& gradients_;
};

}  // namespace

void forward(const Experts& experts, const float* x, float* h, float* rows, float* y,
             const Parallel& parallel) {
  const int64_t hidden = experts.hidden, width = experts.width, up = experts.up();
  const int64_t most = largest_size(experts);
  parallel(experts.num_segments, most * (hidden + up + width), [&](int64_t index, float* scratch) {
    const Segment& segment = experts.segments[index];
    float *gathered = scratch, *pre = gathered + most * hidden, *active = pre + most * up;
    loops().gather(x, experts.order + segment.first, experts.top_k, hidden, segment.count,
                   segment.size, gathered);
    multiply(gathered, experts.w_up + segment.expert * up * hidden, true, segment.size, hidden, up,
             pre);
    loops().activate(pre, experts.swiglu, segment.size, width, active);
    if (h != nullptr) std::copy_n(pre, segment.count * up, h + segment.first * up);
    multiply_into(active, experts.w_down + segment.expert * hidden * width, true, segment, width,
                  hidden, gathered, rows + segment.first * hidden);
  });
  combine_all(experts, rows, experts.weights, y, parallel);
}

void backward(const Experts& experts, const float* grad, const float* x, const float* h,
              const Gradients& gradients, int64_t window, int64_t threads,
              const Parallel& parallel) {
  const int64_t hidden = experts.hidden, width = experts.width, up = experts.up();
  const std::vector<Window> windows = windows_of(experts, window);
  int64_t rows = 0;
  for (const Window& part : windows) rows = std::max(rows, part.rows);
  const auto memory = std::make_unique_for_overwrite<float[]>(rows * (2 * hidden + width + up));
  const Buffers buffers{memory.get(), memory.get() + rows * hidden,
                        memory.get() + rows * 2 * hidden,
                        memory.get() + rows * (2 * hidden + width)};
  const Backward pass(experts, grad, x, h, gradients);
  const int64_t scratch = largest_size(experts) * std::max(hidden, width);
  for (const Window& part : windows) {
    parallel(part.end_segment - part.first_segment, scratch,
             [&](int64_t index, float* own_scratch) {
               pass.compute_segment(part, part.first_segment + index, buffers, own_scratch);
             });
    const std::vector<Block> blocks = pass.blocks(part, threads);
    parallel(static_cast<int64_t>(blocks.size()), 0,
             [&](int64_t index, float*) { pass.weight_gradient(part, blocks[index], buffers); });
  }
  if (gradients.x != nullptr) combine_all(experts, gradients.rows, nullptr, gradients.x, parallel);
}

}  // namespace nemocascade::moe_experts
