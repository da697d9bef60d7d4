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

// The state of a head moves on by a token; y = S C + D x replaces x [head_dim].
INLINE void scan(const Mamba& m, int64_t head, float step, const float* b, const float* c,
                 float* state, float* x) {
  const float decay = std::exp(step * m.a[head]), skip = m.d[head];
  const int64_t whole = m.state / kLanes * kLanes, rest = m.state - whole;
  for (int64_t p = 0; p < m.head_dim; p += 4) {
    const int64_t count = std::min<int64_t>(4, m.head_dim - p);
    Floats sums[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      float* row = state + (p + i) * m.state;
      const float added = step * x[p + i];
      for (int64_t n = 0; n < whole; n += kLanes) {
        const Floats next = load(row + n) * decay + added * load(b + n);
        store(row + n, next);
        sums[i] += next * load(c + n);
      }
      if (rest > 0) {
        const Floats next =
            load_tail(row + whole, rest, 0.0f) * decay + added * load_tail(b + whole, rest, 0.0f);
        store_tail(row + whole, rest, next);
        sums[i] += next * load_tail(c + whole, rest, 0.0f);
      }
    }
    const Quad y = four_sums(sums[0], sums[1], sums[2], sums[3]);
    for (int64_t i = 0; i < count; ++i) x[p + i] = y[i] + skip * x[p + i];
  }
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
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < length; t += 4) {
      const int64_t count = std::min<int64_t>(4, length - t);
      Floats sums[4] = {};
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t lanes = std::min(kLanes, dim - d);
        const Floats part = loaded(query + d, lanes);
        for (int64_t i = 0; i < count; ++i)
          sums[i] += part * loaded(keys + (t + i) * dim + d, lanes);
      }
      const Quad found = four_sums(sums[0], sums[1], sums[2], sums[3]) * scale;
      for (int64_t i = 0; i < count; ++i) {
        scores[t + i] = found[i];
        top = std::max(top, found[i]);
      }
    }
    std::fill(scores + length, scores + padded, -std::numeric_limits<float>::infinity());
    Floats totals = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
      const Floats weights = exponential(load(scores + t) - top);
      store(scores + t, weights);
      totals += weights;
    }
    const float share = 1.0f / one_sum(totals);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t lanes = std::min(kLanes, dim - d);
      Floats sum = {};
      for (int64_t t = 0; t < length; ++t) sum += scores[t] * loaded(values + t * dim + d, lanes);
      stored(out + r * dim + d, lanes, sum * share);
    }
  }
}

}  // namespace nemocascade::decode_step
