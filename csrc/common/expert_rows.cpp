#include "common/expert_rows.h"

#include "common/simd.h"

namespace nemocascade::NEMOCASCADE_LEVEL {
namespace {

// max(x, 0); a NaN stays NaN.
INLINE Floats relu(Floats x) { return x < 0.0f ? fill(0.0f) : x; }

// Calls f(j, load, store) for every vector of a row of `width` elements. `load` and `store` take
// the vector at element j of a row; the last one may be partial.
template <typename F>
INLINE void for_each_vector(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    f([j](const float* row) { return load(row + j); },
      [j](float* row, Floats values) { store(row + j, values); });
  }
  if (j < width) {
    const int64_t rest = width - j;
    f([j, rest](const float* row) { return load_tail(row + j, rest, 0.0f); },
      [j, rest](float* row, Floats values) { store_tail(row + j, rest, values); });
  }
}

void gather(const float* x, const int32_t* slots, int64_t top_k, int64_t hidden, int64_t count,
            int64_t size, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    copy(x + slots[i] / top_k * hidden, hidden, out + i * hidden);
  }
  clear(out + count * hidden, (size - count) * hidden);
}

void activate(const float* h, bool swiglu, int64_t rows, int64_t width, float* active) {
  if (!swiglu) {
    for_each_vector(rows * width, [&](const auto& at, const auto& put) {
      const Floats positive = relu(at(h));
      put(active, positive * positive);
    });
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float *gates = h + i * 2 * width, *ups = gates + width;
    for_each_vector(width, [&](const auto& at, const auto& put) {
      put(active + i * width, silu(at(gates)) * at(ups));
    });
  }
}

void activate_gradient(const float* h, const float* grad, const float* weights,
                       const int32_t* slots, bool swiglu, int64_t count, int64_t size,
                       int64_t width, const ActivationGradient& out) {
  const int64_t up = swiglu ? 2 * width : width;
  for (int64_t i = 0; i < count; ++i) {
    const float *row = h + i * up, *slope = grad + i * width, weight = weights[slots[i]];
    float *active = out.active + i * width, *grad_row = out.h + i * up;
    Floats dot = fill(0.0f);
    for_each_vector(width, [&](const auto& at, const auto& put) {
      const Floats g = at(slope), weighted = g * weight;
      if (swiglu) {
        const Floats gate = at(row), other = at(row + width), s = sigmoid(gate);
        const Floats open = gate * s, value = open * other;
        dot += value * g;
        put(active, value * weight);
        put(grad_row, weighted * other * (s + open * (1.0f - s)));
        put(grad_row + width, weighted * open);
      } else {
        const Floats positive = relu(at(row)), value = positive * positive;
        dot += value * g;
        put(active, value * weight);
        put(grad_row, weighted * (positive + positive));
      }
    });
    if (out.dots != nullptr) out.dots[slots[i]] = sum(dot);
  }
  clear(out.h + count * up, (size - count) * up);
}

void combine(const float* rows, const int32_t* positions, const float* weights, int64_t filled,
             int64_t top_k, int64_t hidden, int64_t begin, int64_t end, float* out) {
  for (int64_t t = begin; t < end; ++t) {
    for_each_vector(hidden, [&](const auto& at, const auto& put) {
      Floats total = fill(0.0f);
      for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
        if (positions[slot] >= filled) continue;
        const Floats row = at(rows + positions[slot] * hidden);
        total += weights == nullptr ? row : row * weights[slot];
      }
      put(out + t * hidden, total);
    });
  }
}

}  // namespace

const ExpertRows expert_rows = {gather, activate, activate_gradient, combine};

}  // namespace nemocascade::NEMOCASCADE_LEVEL
