// One group of heads on the rows of one chunk: computations shared by forward and backward.
#pragma once

#include "mamba2/mamba2.h"
#include "mamba2/products.h"

namespace nemocascade::mamba2::NEMOCASCADE_LEVEL {

constexpr int64_t kSquare = kChunk * kChunk;
// Bound of |l - l_last / 2| in a chunk: its exponential is far below double's maximum.
constexpr double kExponent = 600.0;

// Consecutive columns of a row of zxbcdt, and their position in a padded row.
struct Segment {
  int64_t source;
  int64_t length;
  int64_t place;
};

// Sizes of one group. In a row x, B, C, every head and B and C are padded to whole vectors.
struct Shape {
  int64_t ratio, head_dim, head_width, width, state, state_width, channels, before, states;

  explicit Shape(const Sizes& s)
      : ratio(s.ratio()),
        head_dim(s.head_dim),
        head_width(padded(s.head_dim)),
        width(ratio * head_width),
        state(s.state),
        state_width(padded(s.state)),
        channels(width + 2 * state_width),
        before(s.window - 1),
        states(state_width * width) {}
};

// Floats of a task, allocated in pieces that start at cache lines and hold zeros.
class Memory {
 public:
  explicit Memory(int64_t floats) : storage_(new float[static_cast<size_t>(floats + kPad)]()) {
    const auto address = reinterpret_cast<uintptr_t>(storage_);
    next_ = storage_ + (64 - address % 64) % 64 / sizeof(float);
  }
  ~Memory() { delete[] storage_; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += padded(floats);
    return taken;
  }

 private:
  float* storage_;
  float* next_;
};

// The decays of a chunk's rows for one head, named as in ssd.py. Beyond the rows: zeros.
struct HeadDecays {
  double e[kChunk], inverse[kChunk];
  float dt[kChunk], slope[kChunk], opened[kChunk], kept[kChunk];
  float passed;
  bool bounded[kChunk];
};

struct Group {
  const Sizes& sizes;
  const Parameters<const float>& given;
  const Rows& zxbcdt;
  int64_t group;
  Shape shape;
  HeadDecays* decays;  // of each head
  Memory memory;
  float *taps, *bias, *weight;   // padded: [K, channels], [channels], [width]
  float* raw;                    // [K - 1 + 32, channels], rows before the convolution
  float* act;                    // [32, channels], after SiLU
  float* scores;                 // [32, 32], C B^T
  float *b_columns, *c_columns;  // [state_width, 32], B and C transposed
  float* mixing;                 // [32, 32], scores times decays of one head
  float* scaled;                 // [32, head_width]
  float* y;                      // [32, width]

  Group(const Sizes& s, const Parameters<const float>& p, const Rows& rows, int64_t index,
        int64_t extra)
      : sizes(s),
        given(p),
        zxbcdt(rows),
        group(index),
        shape(s),
        decays(new HeadDecays[static_cast<size_t>(shape.ratio)]),
        memory((s.window + 1) * shape.channels + shape.width +
               (shape.before + 2 * kChunk) * shape.channels + 2 * kSquare +
               2 * shape.state_width * kChunk + kChunk * (shape.head_width + shape.width) + extra) {
    taps = memory.take(s.window * shape.channels);
    bias = memory.take(shape.channels);
    weight = memory.take(shape.width);
    raw = memory.take((shape.before + kChunk) * shape.channels);
    act = memory.take(kChunk * shape.channels);
    scores = memory.take(kSquare);
    b_columns = memory.take(shape.state_width * kChunk);
    c_columns = memory.take(shape.state_width * kChunk);
    mixing = memory.take(kSquare);
    scaled = memory.take(kChunk * shape.head_width);
    y = memory.take(kChunk * shape.width);

    for (int64_t index = 0; index < num_segments(); ++index) {
      const Segment part = segment(index);
      for (int64_t c = 0; c < part.length; ++c) {
        const int64_t channel = part.source - s.inner() + c;
        bias[part.place + c] = p.conv_bias[channel];
        for (int64_t k = 0; k < s.window; ++k)
          taps[k * shape.channels + part.place + c] = p.conv_weight[channel * s.window + k];
      }
    }
    for (int64_t h = 0; h < shape.ratio; ++h)
      for (int64_t c = 0; c < s.head_dim; ++c)
        weight[h * shape.head_width + c] = p.norm_weight[first_column() + h * s.head_dim + c];
  }

  ~Group() { delete[] decays; }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // The segments are x by head, B and C.
  INLINE int64_t num_segments() const { return shape.ratio + 2; }
  INLINE Segment segment(int64_t index) const {
    const int64_t inner = sizes.inner(), part = index - shape.ratio;
    if (part < 0)
      return {inner + first_column() + index * shape.head_dim, shape.head_dim,
              index * shape.head_width};
    return {2 * inner + (part * sizes.groups + group) * shape.state, shape.state,
            shape.width + part * shape.state_width};
  }

  INLINE const float* b() const { return act + shape.width; }
  INLINE const float* c() const { return act + shape.width + shape.state_width; }
  INLINE int64_t head(int64_t h) const { return group * shape.ratio + h; }
  // The first column of z in a row of zxbcdt, and of the output.
  INLINE int64_t first_column() const { return group * shape.ratio * sizes.head_dim; }
  INLINE int64_t dt_column() const {
    return sizes.inner() + sizes.channels() + group * shape.ratio;
  }

  // Reads the group's heads from a row of z or of the output, each padded.
  INLINE void read_heads(const Rows& rows, int64_t row, float* to) const {
    for (int64_t h = 0; h < shape.ratio; ++h)
      read(rows, row, first_column() + h * shape.head_dim, shape.head_dim,
           to + h * shape.head_width);
  }

  INLINE void write_heads(const float* from, const Rows& rows, int64_t row) const {
    for (int64_t h = 0; h < shape.ratio; ++h)
      write(from + h * shape.head_width, shape.head_dim, rows, row,
            first_column() + h * shape.head_dim);
  }

  // Rows of a pack are far apart, so the hardware prefetcher does not find the next ones.
  INLINE void prefetch_row(int64_t row, int64_t channels) const {
    for (int64_t index = 0; index < num_segments(); ++index) {
      const Segment part = segment(index);
      if (part.place < channels) prefetch(zxbcdt, row, part.source, part.length);
    }
  }

  INLINE void prefetch_heads(const Rows& rows, int64_t row) const {
    prefetch(rows, row, first_column(), shape.ratio * shape.head_dim);
  }

  // Reads row t of the inputs before a document as a padded row.
  INLINE void read_before(const float* inputs, int64_t t, int64_t channels, float* to) const {
    const Rows rows{const_cast<float*>(inputs), sizes.channels(), false};
    for (int64_t index = 0; index < num_segments(); ++index) {
      const Segment part = segment(index);
      if (part.place < channels)
        read(rows, t, part.source - sizes.inner(), part.length, to + part.place);
    }
  }

  // Reads the group's part of a state [heads, head_dim, state] into the layout of `advance`.
  INLINE void read_state(const float* from, float* to) const {
    for (int64_t h = 0; h < shape.ratio; ++h)
      for (int64_t p = 0; p < shape.head_dim; ++p) {
        const float* row = from + (head(h) * shape.head_dim + p) * shape.state;
        for (int64_t n = 0; n < shape.state; ++n)
          to[n * shape.width + h * shape.head_width + p] = row[n];
      }
  }

  // The inverse of `read_state`.
  INLINE void write_state(const float* from, float* to) const {
    for (int64_t h = 0; h < shape.ratio; ++h)
      for (int64_t p = 0; p < shape.head_dim; ++p) {
        float* row = to + (head(h) * shape.head_dim + p) * shape.state;
        for (int64_t n = 0; n < shape.state; ++n)
          row[n] = from[n * shape.width + h * shape.head_width + p];
      }
  }

  // Computes raw and act of `rows` rows from `at`, in the first `channels` of a padded row; act is
  // zero beyond the rows. slope: output for the derivative of SiLU, or null. begin: first row of
  // the document. next: first row of the next chunk; negative if there is none. inputs: rows before
  // the document, or null for zeros.
  INLINE void convolve(int64_t at, int64_t rows, int64_t begin, int64_t next, int64_t channels,
                       float* slope, const float* inputs = nullptr) {
    for (int64_t t = 0; t < shape.before + rows; ++t) {
      float* row = raw + t * shape.channels;
      const int64_t source = at - shape.before + t;
      if (source < begin) {
        if (inputs == nullptr)
          clear(row, channels);
        else
          read_before(inputs, source - begin + shape.before, channels, row);
        continue;
      }
      for (int64_t index = 0; index < num_segments(); ++index) {
        const Segment part = segment(index);
        if (part.place < channels) read(zxbcdt, source, part.source, part.length, row + part.place);
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      if (next >= 0) prefetch_row(next + t, channels);
      if (channels == shape.channels) prefetch_heads(zxbcdt, at + t);
      for (int64_t j = 0; j < channels; j += kLanes) {
        const int64_t place = t * shape.channels + j;
        Floats total = load(bias + j);
        for (int64_t k = 0; k < sizes.window; ++k)
          total += load(raw + place + k * shape.channels) * load(taps + k * shape.channels + j);
        const Floats s = sigmoid(total);
        store(act + place, total * s);
        if (slope != nullptr) store(slope + place, s * (total * (1.0f - s) + 1.0f));
      }
    }
    for (int64_t t = rows; t < kChunk; ++t) clear(act + t * shape.channels, channels);
  }

  // Computes dt of head h and its derivative by its input, in `rows` rows from `at`.
  INLINE void steps(int64_t at, int64_t rows, int64_t h, HeadDecays& d) const {
    const float shift = given.dt_bias[head(h)];
    float inputs[kChunk] = {};
    for (int64_t t = 0; t < rows; ++t)
      inputs[t] = read_one(zxbcdt, at + t, dt_column() + h) + shift;
    const Floats low = fill(sizes.dt_low), high = fill(sizes.dt_high), zero = fill(0.0f);
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      const Floats input = load(inputs + t), free = softplus(input);
      const Floats bounded = free < low ? low : free > high ? high : free;
      store(d.dt + t, bounded);
      store(d.slope + t, free < low || free > high ? zero : sigmoid(input));
    }
    clear(d.dt + rows, kChunk - rows);
  }

  // Computes the decays of every head in `rows` rows from `at`.
  INLINE void decay(int64_t at, int64_t rows) {
    constexpr double kBound = 2 * kExponent / kChunk;
    for (int64_t h = 0; h < shape.ratio; ++h) {
      HeadDecays& d = decays[h];
      steps(at, rows, h, d);
      const double rate = given.A[head(h)];
      double logs[kChunk] = {}, log = 0.0;
      for (int64_t t = 0; t < rows; ++t) {
        const double step = d.dt[t] * rate;
        d.bounded[t] = step < -kBound || step > kBound;
        log += step < -kBound ? -kBound : step > kBound ? kBound : step;
        logs[t] = log;
      }
      const double half = 0.5 * log, middle = std::exp(half);
      for (int64_t t = 0; t < kChunk; t += kDoubleLanes) {
        const Doubles e = exponential(load_as<Doubles>(logs + t) - half), inverse = 1.0 / e;
        store(d.e + t, e);
        store(d.inverse + t, inverse);
        store(d.opened + t, __builtin_convertvector(e * middle, FloatHalf));
        store(d.kept + t, __builtin_convertvector(inverse * middle, FloatHalf));
      }
      d.passed = static_cast<float>(middle * middle);
      for (int64_t t = rows; t < kChunk; ++t) {
        d.e[t] = d.inverse[t] = 0.0;
        d.opened[t] = d.kept[t] = 0.0f;
      }
    }
  }

  // Computes exp(l_i - l_j) of a head, zero above the diagonal and beyond the rows.
  INLINE static void decay_matrix(const HeadDecays& d, int64_t tiles, float* to) {
    const IntHalf lane = lanes<IntHalf, kDoubleLanes>();
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t j = 0; j < kChunk; j += kDoubleLanes) {
        FloatHalf ratio = {};
        if (j <= i) {
          const Doubles factors = load_as<Doubles>(d.inverse + j) * d.e[i];
          const IntHalf below = lane <= static_cast<int32_t>(i - j);
          ratio = below ? __builtin_convertvector(factors, FloatHalf) : ratio;
        }
        store(to + i * kChunk + j, ratio);
      }
  }

  // mixing[i, j] = scores[i, j] * decays[i, j] * dt[j], zero where the decay is zero.
  INLINE void mixing_matrix(const float* decay_ij, const float* dt, int64_t tiles) {
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t j = 0; j < kChunk; j += kLanes) {
        const int64_t at = i * kChunk + j;
        const Floats factor = load(decay_ij + at);
        store(mixing + at, factor == 0.0f ? factor : load(scores + at) * factor * load(dt + j));
      }
  }

  INLINE void score(int64_t tiles) {
    transpose(b(), shape.channels, kChunk, shape.state_width, b_columns, kChunk);
    product({c(), shape.channels, 1}, b_columns, kChunk, tiles, shape.state, kChunk,
            [&](int64_t i, int64_t j, Floats value)
                __attribute__((always_inline)) { store(scores + i * kChunk + j, value); });
  }

  // Computes y + D x of head h from its decay matrix. entering: the state before the chunk, or
  // null. read: output for the scaled product of C and that state, or null.
  INLINE void mix(int64_t h, int64_t tiles, const float* decay_ij, const float* entering,
                  float* read) {
    const HeadDecays& d = decays[h];
    const int64_t at = h * shape.head_width;
    const float skip = given.D[head(h)];
    mixing_matrix(decay_ij, d.dt, tiles);
    product<Part::kLower>({mixing, kChunk, 1}, act + at, shape.channels, tiles, tiles,
                          shape.head_width,
                          [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
                            const Floats x = load(act + i * shape.channels + at + j);
                            store(y + i * shape.width + at + j, value + x * skip);
                          });
    if (entering == nullptr) return;
    product({c(), shape.channels, 1}, entering + at, shape.width, tiles, shape.state,
            shape.head_width,
            [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
              const int64_t place = i * shape.width + at + j;
              const Floats opened = value * d.opened[i];
              store(y + place, load(y + place) + opened);
              if (read != nullptr) store(read + place, opened);
            });
  }

  // scaled = factor[t] * from[t, :] of one head.
  INLINE void scale_rows(const float* from, int64_t from_row, const float* factor, int64_t tiles) {
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t j = 0; j < shape.head_width; j += kLanes)
        store(scaled + t * shape.head_width + j, load(from + t * from_row + j) * factor[t]);
  }

  // after = passed before + B^T (kept dt x), with b_columns of the chunk. before: null for zeros;
  // it may be `after` itself.
  INLINE void advance(int64_t tiles, const float* before, float* after) {
    for (int64_t h = 0; h < shape.ratio; ++h) {
      const HeadDecays& d = decays[h];
      const int64_t at = h * shape.head_width;
      float factor[kChunk];
      for (int64_t t = 0; t < kChunk; ++t) factor[t] = d.kept[t] * d.dt[t];
      scale_rows(act + at, shape.channels, factor, tiles);
      product({b_columns, kChunk, 1}, scaled, shape.head_width, shape.state_width, tiles,
              shape.head_width,
              [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
                const int64_t place = i * shape.width + at + j;
                if (before != nullptr) value += load(before + place) * d.passed;
                store(after + place, value);
              });
    }
  }
};

}  // namespace nemocascade::mamba2::NEMOCASCADE_LEVEL
