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

// The products of kQueries queries with kKeys keys, times `scale`. whole: floats from a query's
// scores to the next query's.
template <int kQueries, int kKeys>
INLINE void dots(const float* q, const float* keys, int64_t dim, float scale, float* scores,
                 int64_t whole) {
  const int64_t even = dim / kLanes * kLanes, rest = dim - even;
  Floats totals[kQueries][4] = {};
  for (int64_t d = 0; d < even; d += kLanes) {
    for (int i = 0; i < kKeys; ++i) {
      const Floats key = load(keys + i * dim + d);
      for (int r = 0; r < kQueries; ++r) totals[r][i] += load(q + r * dim + d) * key;
    }
  }
  if (rest > 0) {
    for (int i = 0; i < kKeys; ++i) {
      const Floats key = load_tail(keys + i * dim + even, rest, 0.0f);
      for (int r = 0; r < kQueries; ++r) {
        totals[r][i] += load_tail(q + r * dim + even, rest, 0.0f) * key;
      }
    }
  }
  for (int r = 0; r < kQueries; ++r) {
    const Quad found = sums(totals[r][0], totals[r][1], totals[r][2], totals[r][3]) * scale;
    if (kKeys == 4) {
      store(scores + r * whole, found);
    } else {
      scores[r * whole] = found[0];
    }
  }
}

// The products of kQueries queries with `count` keys of a block, times `scale`.
template <int kQueries>
INLINE void score(const float* q, const float* keys, int64_t dim, int64_t count, float scale,
                  float* scores, int64_t whole) {
  int64_t t = 0;
  for (; t + kKeysTogether <= count; t += kKeysTogether) {
    dots<kQueries, kKeysTogether>(q, keys + t * dim, dim, scale, scores + t, whole);
  }
  for (; t < count; ++t) {
    dots<kQueries, 1>(q, keys + t * dim, dim, scale, scores + t, whole);
  }
}

// The weighted sums of `length` cached values for kQueries queries, times their shares: kVectors
// vectors of columns from `column` on, all whole, or one of `lanes` columns.
template <int kQueries, int kVectors>
INLINE void weigh(const float* weights, int64_t whole, const Cache& cache, int64_t column,
                  int64_t length, int64_t lanes, const float* shares, int64_t dim, float* out) {
  // Four chains, so that an addition does not wait for the previous one.
  Floats totals[kQueries][kVectors][kKeysTogether] = {};
  const int32_t* block = cache.table;
  for (int64_t first = 0; first < length; first += cache.size) {
    const float* values = cache.values + *block++ * cache.block + column;
    const int64_t count = smaller(cache.size, length - first);
    const float* weight = weights + first;
    int64_t t = 0;
    if (lanes == kLanes) {
      for (; t + kKeysTogether <= count; t += kKeysTogether) {
        for (int i = 0; i < kKeysTogether; ++i) {
          for (int v = 0; v < kVectors; ++v) {
            const Floats value = load(values + (t + i) * dim + v * kLanes);
            for (int r = 0; r < kQueries; ++r) {
              totals[r][v][i] += weight[r * whole + t + i] * value;
            }
          }
        }
      }
    }
    for (; t < count; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        const Floats value = load_tail(values + t * dim + v * kLanes, lanes, 0.0f);
        for (int r = 0; r < kQueries; ++r) totals[r][v][0] += weight[r * whole + t] * value;
      }
    }
  }
  for (int r = 0; r < kQueries; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats* part = totals[r][v];
      stored(out + r * dim + v * kLanes, lanes,
             ((part[0] + part[1]) + (part[2] + part[3])) * shares[r]);
    }
  }
}

// Attention of kQueries queries.
template <int kQueries>
INLINE void attend(const float* q, const Cache& cache, int64_t dim, int64_t length, float* scores,
                   float* out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int64_t whole = (length + kKeysAtATime - 1) / kKeysAtATime * kKeysAtATime;
  const int32_t* block = cache.table;
  for (int64_t first = 0; first < length; first += cache.size) {
    const float* keys = cache.keys + *block++ * cache.block;
    score<kQueries>(q, keys, dim, smaller(cache.size, length - first), scale, scores + first,
                    whole);
  }
  float shares[kQueries];
  for (int r = 0; r < kQueries; ++r) {
    float* mine = scores + r * whole;
    for (int64_t t = length; t < whole; ++t) mine[t] = kLowest;
    const float top = row_maximum(mine, length);
    Floats totals = {};
    for (int64_t t = 0; t < whole; t += kLanes) {
      const Floats weights = exponential(load(mine + t) - top);
      store(mine + t, weights);
      totals += weights;
    }
    shares[r] = 1.0f / sum(totals);
  }
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    weigh<kQueries, 2>(scores, whole, cache, d, length, kLanes, shares, dim, out + d);
  }
  for (; d < dim; d += kLanes) {
    weigh<kQueries, 1>(scores, whole, cache, d, length, smaller(kLanes, dim - d), shares, dim,
                       out + d);
  }
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

void attention(const float* q, const Cache& cache, int64_t ratio, int64_t dim, int64_t length,
               float* scratch, float* out) {
  int64_t r = 0;
  for (; r + kQueriesTogether <= ratio; r += kQueriesTogether) {
    attend<kQueriesTogether>(q + r * dim, cache, dim, length, scratch, out + r * dim);
  }
  for (; r < ratio; ++r) attend<1>(q + r * dim, cache, dim, length, scratch, out + r * dim);
}

}  // namespace

const Mixers mixers = {mamba, attention};

}  // namespace nemocascade::decode_step::NEMOCASCADE_LEVEL
