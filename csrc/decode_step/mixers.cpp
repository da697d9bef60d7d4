#include <cmath>

#include "common/simd.h"
#include "decode_step/step.h"

namespace nemocascade::decode_step::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

static_assert(kKeysAtATime % kLanes == 0);

INLINE float bounded(float x, float low, float high) {
  const float above = x < low ? low : x;
  return above > high ? high : above;
}

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

// out[i] = silu(conv) of channels [first, first + count); advances their states by a token.
INLINE void convolve(const Mamba& m, const float* x, int64_t first, int64_t count, float* conv,
                     float* out) {
  const int64_t channels = m.channels(), last = m.width - 1;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t c = first + i, lanes = smaller(kLanes, count - i);
    // The taps of a channel are contiguous; those of neighbouring channels are K apart.
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

// Advances kRows rows of a head's state by a token; y = S C, one for each row, padded with zeros.
template <int kRows>
INLINE Quad scan_rows(int64_t size, float decay, const float* added, const float* b, const float* c,
                      float* state) {
  const int64_t whole = size / kLanes * kLanes, rest = size - whole;
  Floats totals[4] = {};
  for (int64_t n = 0; n < whole; n += kLanes) {
    const Floats from = load(b + n), to = load(c + n);
    for (int i = 0; i < kRows; ++i) {
      float* at = state + i * size + n;
      const Floats next = load(at) * decay + added[i] * from;
      store(at, next);
      totals[i] += next * to;
    }
  }
  if (rest > 0) {
    const Floats from = load_tail(b + whole, rest, 0.0f), to = load_tail(c + whole, rest, 0.0f);
    for (int i = 0; i < kRows; ++i) {
      float* at = state + i * size + whole;
      const Floats next = load_tail(at, rest, 0.0f) * decay + added[i] * from;
      store_tail(at, rest, next);
      totals[i] += next * to;
    }
  }
  return sums(totals[0], totals[1], totals[2], totals[3]);
}

// Advances the state of a head by a token; y = S C + D x replaces x [head_dim].
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

// The products of a query with kKeys keys, padded with zeros.
template <int kKeys>
INLINE Quad dots(const float* query, const float* keys, int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes, rest = dim - whole;
  Floats totals[4] = {};
  for (int64_t d = 0; d < whole; d += kLanes) {
    const Floats part = load(query + d);
    for (int i = 0; i < kKeys; ++i) totals[i] += part * load(keys + i * dim + d);
  }
  if (rest > 0) {
    const Floats part = load_tail(query + whole, rest, 0.0f);
    for (int i = 0; i < kKeys; ++i) {
      totals[i] += part * load_tail(keys + i * dim + whole, rest, 0.0f);
    }
  }
  return sums(totals[0], totals[1], totals[2], totals[3]);
}

// The weighted sum of `length` rows, kLanes columns of them at `values`; `lanes` columns count.
INLINE Floats weighted(const float* weights, const float* values, int64_t dim, int64_t length,
                       int64_t lanes) {
  // Four chains, so that an addition does not wait for the previous one.
  Floats totals[4] = {};
  int64_t t = 0;
  if (lanes == kLanes) {
    for (; t + 4 <= length; t += 4) {
      for (int i = 0; i < 4; ++i) totals[i] += weights[t + i] * load(values + (t + i) * dim);
    }
  }
  for (; t < length; ++t) totals[0] += weights[t] * load_tail(values + t * dim, lanes, 0.0f);
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

void mamba(const Mamba& m, const float* zxbcdt, int64_t group, float* conv, float* ssm,
           float* scratch, float* out) {
  [[maybe_unused]] const FlushDenormals flush;
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
    const float step = bounded(soft, m.dt_low, m.dt_high);
    scan(m, head, step, b, c, ssm + head * m.head_dim * m.state, x + h * m.head_dim);
  }
  Floats squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t lanes = smaller(kLanes, width - i);
    const Floats u = loaded(x + i, lanes) * silu(loaded(zxbcdt + first + i, lanes));
    stored(x + i, lanes, u);
    squares += u * u;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + m.eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t lanes = smaller(kLanes, width - i);
    const Floats weight = loaded(m.norm_weight + first + i, lanes);
    stored(out + first + i, lanes, loaded(x + i, lanes) * scale * weight);
  }
}

void attention(const float* q, const float* keys, const float* values, int64_t ratio, int64_t dim,
               int64_t length, float* scratch, float* out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int64_t whole = (length + kKeysAtATime - 1) / kKeysAtATime * kKeysAtATime;
  for (int64_t r = 0; r < ratio; ++r) {
    const float* query = q + r * dim;
    float* scores = scratch + r * whole;
    int64_t t = 0;
    for (; t + 4 <= length; t += 4) {
      const Quad found = dots<4>(query, keys + t * dim, dim) * scale;
      store(scores + t, found);
    }
    for (; t < length; ++t) scores[t] = dots<1>(query, keys + t * dim, dim)[0] * scale;
    for (t = length; t < whole; ++t) scores[t] = kLowest;
    const float top = row_maximum(scores, length);
    Floats totals = {};
    for (t = 0; t < whole; t += kLanes) {
      const Floats weights = exponential(load(scores + t) - top);
      store(scores + t, weights);
      totals += weights;
    }
    const float share = 1.0f / sum(totals);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t lanes = smaller(kLanes, dim - d);
      stored(out + r * dim + d, lanes, weighted(scores, values + d, dim, length, lanes) * share);
    }
  }
}

}  // namespace

const Mixers mixers = {mamba, attention};

}  // namespace nemocascade::decode_step::NEMOCASCADE_LEVEL
