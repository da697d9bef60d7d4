#include "common/simd.h"
#include "decode_step/step.h"

namespace nemocascade::decode_step::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

// Rows of a block: with four columns, its sums and factors stay in registers.
constexpr int kRows = kLanes == 16 ? 4 : 3;

// Sums of M rows with N columns, N a multiple of 4. Each sum has one accumulator, whose lanes are
// added up at the end: the same operations for every M and N.
template <int kM, int kN>
INLINE void block(const Product& p, int64_t row, int64_t column) {
  Floats totals[kM][kN] = {};
  const float* w = p.w + column * p.depth;
  int64_t k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) {
    Floats x[kM];
    for (int m = 0; m < kM; ++m) x[m] = load(p.x[row + m] + k);
    for (int n = 0; n < kN; ++n) {
      const Floats weights = load(w + n * p.depth + k);
      for (int m = 0; m < kM; ++m) totals[m][n] += x[m] * weights;
    }
  }
  if (k < p.depth) {
    const int64_t rest = p.depth - k;
    for (int m = 0; m < kM; ++m) {
      const Floats x = load_tail(p.x[row + m] + k, rest, 0.0f);
      for (int n = 0; n < kN; ++n) totals[m][n] += x * load_tail(w + n * p.depth + k, rest, 0.0f);
    }
  }
  for (int m = 0; m < kM; ++m) {
    const int64_t at = (row + m) * p.columns + column;
    for (int n = 0; n < kN; n += 4) {
      Quad found = sums(totals[m][n], totals[m][n + 1], totals[m][n + 2], totals[m][n + 3]);
      if (p.residual != nullptr) found = load_as<Quad>(p.residual + at + n) + found;
      store(p.out + at + n, found);
    }
  }
}

// A remaining column, padded to four with itself.
INLINE void last_column(const Product& p, int64_t row, int64_t column) {
  Floats total = {};
  const float* w = p.w + column * p.depth;
  int64_t k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) total += load(p.x[row] + k) * load(w + k);
  if (k < p.depth) {
    total += load_tail(p.x[row] + k, p.depth - k, 0.0f) * load_tail(w + k, p.depth - k, 0.0f);
  }
  const float found = sums(total, total, total, total)[0];
  const int64_t at = row * p.columns + column;
  p.out[at] = p.residual == nullptr ? found : p.residual[at] + found;
}

template <int kN>
INLINE void columns_of_rows(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) block<kRows, kN>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) block<2, kN>(p, row, column);
  for (; row < p.rows; ++row) block<1, kN>(p, row, column);
}

void product(const Product& p, int64_t begin, int64_t end) {
  int64_t column = begin;
  if (p.rows < kRows) {
    // Several columns at a time hide the latency of additions.
    for (; column + 8 <= end; column += 8) {
      for (int64_t row = 0; row < p.rows; ++row) block<1, 8>(p, row, column);
    }
  }
  for (; column + 4 <= end; column += 4) columns_of_rows<4>(p, column);
  for (; column < end; ++column) {
    for (int64_t row = 0; row < p.rows; ++row) last_column(p, row, column);
  }
}

void rms_norm(const float* x, const float* weight, int64_t depth, float eps, int64_t begin,
              int64_t end, float* out) {
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
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(depth) + eps);
    for (k = 0; k + kLanes <= depth; k += kLanes) {
      store(to + k, load(from + k) * scale * load(weight + k));
    }
    for (; k < depth; ++k) to[k] = from[k] * scale * weight[k];
  }
}

void scores(const float* logits, int64_t rows, int64_t count, bool softmax, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = logits + r * count;
    float* to = out + r * count;
    const float top = softmax ? row_maximum(from, count) : 0.0f;
    Floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t lanes = smaller(kLanes, count - i);
      const Floats x = load_tail(from + i, lanes, softmax ? kLowest : 0.0f);
      const Floats found = softmax ? exponential(x - top) : sigmoid(x);
      store_tail(to + i, lanes, found);
      total += found;
    }
    if (!softmax) continue;
    const float share = 1.0f / sum(total);
    for (int64_t i = 0; i < count; ++i) to[i] *= share;
  }
}

}  // namespace

const RowSteps row_steps = {product, rms_norm, scores};

}  // namespace nemocascade::decode_step::NEMOCASCADE_LEVEL
