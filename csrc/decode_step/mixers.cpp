#include <algorithm>
#include <cmath>
#include <limits>

#include "common/vectors.h"
#include "decode_step/step.h"
#include "decode_step/sums.h"

namespace nemocascade::decode_step {
namespace {

INLINE Floats loaded(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : load_tail(from, count, 0.0f);
}

INLINE void stored(float* to, int64_t count, Floats values) {
  if (count >= kLanes) {
    store(to, values);
  } else {
    store_tail(to, count, values);
  }
}

// out[i] = silu(conv) of channels [first, first + count), whose states move on by a token.
INLINE void convolve(const Mamba& m, const float* x, int64_t first, int64_t count, float* conv,
                     float* out) {
  const int64_t channels = m.channels(), last = m.width - 1;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t c = first + i, lanes = std::min(kLanes, count - i);
    // The taps of a channel stand together, those of neighbours K apart.
    const auto tap = [&](int64_t k) __attribute__((always_inline)) {
      Floats values = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        values[lane] = m.conv_weight[(c + lane) * m.width + k];
      }
      return values;
    };
    const Floats now = loaded(x + c, lanes);
    Floats sum = loaded(m.conv_bias + c, lanes);
    for (int64_t k = 0; k < last; ++k) {
      float* at = conv + k * channels + c;
      sum += loaded(at, lanes) * tap(k);
      stored(at, lanes, k + 1 < last ? loaded(at + channels, lanes) : now);
    }
    sum += now * tap(last);
    stored(out + i, lanes, silu(sum));
  }
}

// kRows rows of a head's state move on by a token; y = S C, one for each row and zeros.
template <int kRows>
INLINE Quad scan_rows(int64_t size, float decay, const float* added, const float* b, const float* c,
                      float* state) {
  const int64_t whole = size / kLanes * kLanes, rest = size - whole;
  Floats sums[4] = {};
  for (int64_t n = 0; n < whole; n += kLanes) {
    const Floats from = load(b + n), to = load(c + n);
    for (int i = 0; i < kRows; ++i) {
      float* at = state + i * size + n;
      const Floats next = load(at) * decay + added[i] * from;
      store(at, next);
      sums[i] += next * to;
    }
  }
  if (rest > 0) {
    const Floats from = load_tail(b + whole, rest, 0.0f), to = load_tail(c + whole, rest, 0.0f);
    for (int i = 0; i < kRows; ++i) {
      float* at = state + i * size + whole;
      const Floats next = load_tail(at, rest, 0.0f) * decay + added[i] * from;
      store_tail(at, rest, next);
      sums[i] += next * to;
    }
  }
  return four_sums(sums[0], sums[1], sums[2], sums[3]);
}

// The state of a head moves on by a token; y = S C + D x replaces x [head_dim].
INLINE void scan(const Mamba& m, int64_t head, float step, const float* b, const float* c,
                 float* state, float* x) {
  const float decay = std::exp(step * m.a[head]), skip = m.d[head];
  int64_t p = 0;
  for (; p + 4 <= m.head_dim; p += 4) {
    float added[4];
    for (int i = 0; i < 4; ++i) added[i] = step * x[p + i];
    const Quad y = scan_rows<4>(m.state, decay, added, b, c, state + p * m.state);
    for (int i = 0; i < 4; ++i) x[p + i] = y[i] + skip * x[p + i];
  }
  for (; p < m.head_dim; ++p) {
    const float added = step * x[p];
    x[p] = scan_rows<1>(m.state, decay, &added, b, c, state + p * m.state)[0] + skip * x[p];
  }
}

// The products of a query with kKeys keys, and zeros.
template <int kKeys>
INLINE Quad dots(const float* query, const float* keys, int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes, rest = dim - whole;
  Floats sums[4] = {};
  for (int64_t d = 0; d < whole; d += kLanes) {
    const Floats part = load(query + d);
    for (int i = 0; i < kKeys; ++i) sums[i] += part * load(keys + i * dim + d);
  }
  if (rest > 0) {
    const Floats part = load_tail(query + whole, rest, 0.0f);
    for (int i = 0; i < kKeys; ++i) {
      sums[i] += part * load_tail(keys + i * dim + whole, rest, 0.0f);
    }
  }
  return four_sums(sums[0], sums[1], sums[2], sums[3]);
}

// The weighted sum of `length` rows, kLanes columns of them at `values`; `lanes` columns count.
INLINE Floats weighted(const float* weights, const float* values, int64_t dim, int64_t length,
                       int64_t lanes) {
  // Four chains, so that an addition need not wait for the one before.
  Floats sums[4] = {};
  int64_t t = 0;
  if (lanes == kLanes) {
    for (; t + 4 <= length; t += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += weights[t + i] * load(values + (t + i) * dim);
    }
  }
  for (; t < length; ++t) sums[0] += weights[t] * load_tail(values + t * dim, lanes, 0.0f);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

FOR_EACH_CPU void mamba(const Mamba& m, const float* zxbcdt, int64_t group, float* conv, float* ssm,
                        float* scratch, float* out) {
  const int64_t inner = m.inner(), channels = m.channels(), width = m.group_width();
  const int64_t first = group * width, ratio = m.heads / m.groups;
  float *x = scratch, *b = x + width, *c = b + m.state;
  const float* xbc = zxbcdt + inner;
  convolve(m, xbc, first, width, conv, x);
  convolve(m, xbc, inner + group * m.state, m.state, conv, b);
  convolve(m, xbc, inner + (m.groups + group) * m.state, m.state, conv, c);
  for (int64_t h = 0; h < ratio; ++h) {
    const int64_t head = group * ratio + h;
    const float raw = zxbcdt[inner + channels + head] + m.dt_bias[head];
    const float soft = raw > 20.0f ? raw : std::log1p(std::exp(raw));
    const float step = std::min(std::max(soft, m.dt_low), m.dt_high);
    scan(m, head, step, b, c, ssm + head * m.head_dim * m.state, x + h * m.head_dim);
  }
  Floats squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t lanes = std::min(kLanes, width - i);
    const Floats u = loaded(x + i, lanes) * silu(loaded(zxbcdt + first + i, lanes));
    stored(x + i, lanes, u);
    squares += u * u;
  }
  const float scale = 1.0f / std::sqrt(one_sum(squares) / static_cast<float>(width) + m.eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t lanes = std::min(kLanes, width - i);
    const Floats weight = loaded(m.norm_weight + first + i, lanes);
    stored(out + first + i, lanes, loaded(x + i, lanes) * scale * weight);
  }
}

FOR_EACH_CPU void attention(const float* q, const float* keys, const float* values, int64_t ratio,
                            int64_t dim, int64_t length, float* scratch, float* out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int64_t padded = (length + kKeysAtATime - 1) / kKeysAtATime * kKeysAtATime;
  for (int64_t r = 0; r < ratio; ++r) {
    const float* query = q + r * dim;
    float* scores = scratch + r * padded;
    int64_t t = 0;
    for (; t + 4 <= length; t += 4) {
      const Quad found = dots<4>(query, keys + t * dim, dim) * scale;
      std::memcpy(scores + t, &found, sizeof(found));
    }
    for (; t < length; ++t) scores[t] = dots<1>(query, keys + t * dim, dim)[0] * scale;
    std::fill(scores + length, scores + padded, -std::numeric_limits<float>::infinity());
    Floats tops = load(scores), totals = {};
    for (t = kLanes; t < padded; t += kLanes) tops = larger(load(scores + t), tops);
    float top = tops[0];
    for (int64_t i = 1; i < kLanes; ++i) top = std::max(top, tops[i]);
    for (t = 0; t < padded; t += kLanes) {
      const Floats weights = exponential(load(scores + t) - top);
      store(scores + t, weights);
      totals += weights;
    }
    const float share = 1.0f / one_sum(totals);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t lanes = std::min(kLanes, dim - d);
      stored(out + r * dim + d, lanes, weighted(scores, values + d, dim, length, lanes) * share);
    }
  }
}

}  // namespace nemocascade::decode_step
