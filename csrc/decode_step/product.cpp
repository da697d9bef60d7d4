#include <algorithm>
#include <limits>

#include "common/vectors.h"
#include "decode_step/step.h"
#include "decode_step/sums.h"

namespace nemocascade::decode_step {
namespace {

// Sums of M rows with N columns, N a multiple of 4. Each sum has one accumulator, whose lanes are
// added up at the end: the same operations for every M and N.
template <int kM, int kN>
INLINE void block(const Product& p, int64_t row, int64_t column) {
  Floats sums[kM][kN] = {};
  const float* w = p.w + column * p.depth;
  int64_t k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) {
    Floats weights[kN];
    for (int n = 0; n < kN; ++n) weights[n] = load(w + n * p.depth + k);
    for (int m = 0; m < kM; ++m) {
      const Floats x = load(p.x[row + m] + k);
      for (int n = 0; n < kN; ++n) sums[m][n] += x * weights[n];
    }
  }
  if (k < p.depth) {
    const int64_t rest = p.depth - k;
    for (int m = 0; m < kM; ++m) {
      const Floats x = load_tail(p.x[row + m] + k, rest, 0.0f);
      for (int n = 0; n < kN; ++n) sums[m][n] += x * load_tail(w + n * p.depth + k, rest, 0.0f);
    }
  }
  for (int m = 0; m < kM; ++m) {
    const int64_t at = (row + m) * p.columns + column;
    for (int n = 0; n < kN; n += 4) {
      Quad found = four_sums(sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]);
      if (p.residual != nullptr) {
        Quad before;
        std::memcpy(&before, p.residual + at + n, sizeof(before));
        found = before + found;
      }
      std::memcpy(p.out + at + n, &found, sizeof(found));
    }
  }
}

// A column of the last few, padded to four with itself.
INLINE void last_column(const Product& p, int64_t row, int64_t column) {
  Floats sum = {};
  const float* w = p.w + column * p.depth;
  int64_t k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) sum += load(p.x[row] + k) * load(w + k);
  if (k < p.depth) {
    sum += load_tail(p.x[row] + k, p.depth - k, 0.0f) * load_tail(w + k, p.depth - k, 0.0f);
  }
  const float found = four_sums(sum, sum, sum, sum)[0];
  const int64_t at = row * p.columns + column;
  p.out[at] = p.residual == nullptr ? found : p.residual[at] + found;
}

template <int kN>
INLINE void columns_of_rows(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) block<4, kN>(p, row, column);
  for (; row < p.rows; ++row) block<1, kN>(p, row, column);
}

}  // namespace

FOR_EACH_CPU void product(const Product& p, int64_t begin, int64_t end) {
  int64_t column = begin;
  if (p.rows < 4) {
    // More columns at a time hide the additions' latency.
    for (; column + 8 <= end; column += 8) columns_of_rows<8>(p, column);
  }
  for (; column + 4 <= end; column += 4) columns_of_rows<4>(p, column);
  for (; column < end; ++column) {
    for (int64_t row = 0; row < p.rows; ++row) last_column(p, row, column);
  }
}

FOR_EACH_CPU void rms_norm(const float* x, const float* weight, int64_t depth, float eps,
                           int64_t begin, int64_t end, float* out) {
  for (int64_t r = begin; r < end; ++r) {
    const float* from = x + r * depth;
    float* to = out + r * depth;
    Floats squares = {};
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) squares += load(from + k) * load(from + k);
    if (k < depth) {
      const Floats last = load_tail(from + k, depth - k, 0.0f);
      squares += last * last;
    }
    const float scale = 1.0f / __builtin_sqrtf(one_sum(squares) / static_cast<float>(depth) + eps);
    for (k = 0; k + kLanes <= depth; k += kLanes) {
      store(to + k, load(from + k) * scale * load(weight + k));
    }
    for (; k < depth; ++k) to[k] = from[k] * scale * weight[k];
  }
}

FOR_EACH_CPU void scores(const float* logits, int64_t rows, int64_t count, bool softmax,
                         float* out) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = logits + r * count;
    float* to = out + r * count;
    const float top = softmax ? *std::max_element(from, from + count) : 0.0f;
    Floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = std::min(kLanes, count - i);
      const Floats x = load_tail(from + i, lanes, softmax ? kLowest : 0.0f);
      const Floats found = softmax ? exponential(x - top) : sigmoid(x);
      store_tail(to + i, lanes, found);
      total += found;
    }
    if (!softmax) continue;
    const float share = 1.0f / one_sum(total);
    for (int64_t i = 0; i < count; ++i) to[i] *= share;
  }
}

FOR_EACH_CPU void relu2(float* h, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float positive = h[i] > 0.0f ? h[i] : 0.0f;
    h[i] = positive * positive;
  }
}

FOR_EACH_CPU void swiglu(float* h, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    float* gate = h + r * 2 * width;
    const float* up = gate + width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Floats g = load(gate + i);
      store(gate + i, silu(g) * load(up + i));
    }
    if (i < width) {
      const Floats g = load_tail(gate + i, width - i, 0.0f);
      const Floats u = load_tail(up + i, width - i, 0.0f);
      store_tail(gate + i, width - i, silu(g) * u);
    }
  }
}

FOR_EACH_CPU void combine(const float* y, const float* weights, const int32_t* experts,
                          int32_t absent, int64_t tokens, int64_t top_k, int64_t depth,
                          float* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* to = out + t * depth;
    std::fill_n(to, depth, 0.0f);
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = t * top_k + k;
      if (experts[slot] == absent) continue;
      const float* from = y + slot * depth;
      const float weight = weights[slot];
      for (int64_t i = 0; i < depth; ++i) to[i] += weight * from[i];
    }
  }
}

}  // namespace nemocascade::decode_step
