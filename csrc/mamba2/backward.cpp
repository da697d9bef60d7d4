#include "mamba2/group.h"

namespace nemocascade::mamba2::NEMOCASCADE_LEVEL {
namespace {

// Number of chunks whose entering states are in memory; one state is kept for those before them.
constexpr int64_t kHeldStates = 64;

constexpr int64_t chunks_of(Document document) {
  return (document.end - document.begin + kChunk - 1) / kChunk;
}

constexpr int64_t parts_of(int64_t chunks) { return (chunks + kHeldStates - 1) / kHeldStates; }

// The gradients of one chunk, laid out like the values in Group. The recurrence over chunks runs
// backwards: `leaving` is the gradient of the state after the chunk, `entering` of that before it.
struct Gradients {
  Group& g;
  const Parameters<double>& sums;
  const Rows& d_out;
  const Rows& d_zxbcdt;
  int64_t at = 0, rows = 0, tiles = 0;
  bool left = false;             // the document has a chunk after this one
  const float* state = nullptr;  // before the chunk; null if the document starts here
  float *act, *slope;            // of act; derivative of SiLU
  float* pre;                    // before SiLU; the next chunk's first rows follow
  float *y, *read;               // of y; product of C and the entering state, scaled
  float *decays, *squares;       // [ratio, 32, 32] of each head; of mixing
  float *scores, *score_sums;    // of scores; [32], one head's sums over rows
  float *b_columns, *c_columns;  // [state_width, 32]: of B and C through the states
  float *x_columns, *y_columns;  // [head_width, 32]: x and dy of a head, transposed
  float *entering, *leaving;
  float* added;                                      // [32, head_width]
  float *z, *gate, *gate_slope, *normed, *upstream;  // one row each
  float *held, *firsts;                              // states: see document_backward
  float *conv_sums, *weight_sums;                    // [K + 1, channels], [width]

  static int64_t floats(const Sizes& sizes) {
    const Shape s(sizes);
    return (3 * kChunk + s.before + sizes.window + 1) * s.channels + (2 * kChunk + 6) * s.width +
           (s.ratio + 2) * kSquare + kChunk + 2 * kChunk * s.state_width +
           3 * kChunk * s.head_width + 2 * s.states;
  }

  Gradients(Group& group, const Parameters<double>& p, const Rows& given, const Rows& wanted)
      : g(group), sums(p), d_out(given), d_zxbcdt(wanted) {
    const Shape& s = g.shape;
    const auto take = [&](int64_t count) { return g.memory.take(count); };
    act = take(kChunk * s.channels);
    slope = take(kChunk * s.channels);
    pre = take((kChunk + s.before) * s.channels);
    y = take(kChunk * s.width);
    read = take(kChunk * s.width);
    decays = take(s.ratio * kSquare);
    squares = take(kSquare);
    scores = take(kSquare);
    score_sums = take(kChunk);
    b_columns = take(kChunk * s.state_width);
    c_columns = take(kChunk * s.state_width);
    x_columns = take(kChunk * s.head_width);
    y_columns = take(kChunk * s.head_width);
    entering = take(s.states);
    leaving = take(s.states);
    added = take(kChunk * s.head_width);
    z = take(s.width);
    gate = take(s.width);
    gate_slope = take(s.width);
    normed = take(s.width);
    upstream = take(s.width);
    conv_sums = take((g.sizes.window + 1) * s.channels);
    weight_sums = take(s.width);
  }

  INLINE float* b() const { return act + g.shape.width; }
  INLINE float* c() const { return act + g.shape.width + g.shape.state_width; }
  INLINE float* head_decays(int64_t h) const { return decays + h * kSquare; }
};

// The gradients of y, of z, and of the weight from the gated norm of row t.
INLINE void gate_backward(Gradients& d, int64_t t) {
  Group& g = d.g;
  const Shape& s = g.shape;
  g.read_heads(g.zxbcdt, d.at + t, d.z);
  g.read_heads(d.d_out, d.at + t, d.upstream);
  const float* y = g.y + t * s.width;
  Floats squares = {};
  for (int64_t j = 0; j < s.width; j += kLanes) {
    const Floats z = load(d.z + j), gate = sigmoid(z), silu = z * gate;
    const Floats u = load(y + j) * silu;
    squares += u * u;
    store(d.normed + j, u);
    store(d.gate + j, silu);
    store(d.gate_slope + j, gate * (z * (1.0f - gate) + 1.0f));
  }
  const float count = static_cast<float>(s.ratio * s.head_dim);
  const float scale = 1.0f / std::sqrt(sum(squares) / count + g.sizes.eps);
  Floats products = {};
  for (int64_t j = 0; j < s.width; j += kLanes) {
    const Floats normed = load(d.normed + j) * scale, up = load(d.upstream + j);
    const Floats weighted = up * load(g.weight + j);
    store(d.weight_sums + j, load(d.weight_sums + j) + up * normed);
    products += weighted * normed;
    store(d.normed + j, normed);
    store(d.upstream + j, weighted);
  }
  const float along = sum(products) / count;
  for (int64_t j = 0; j < s.width; j += kLanes) {
    const Floats d_u = (load(d.upstream + j) - load(d.normed + j) * along) * scale;
    store(d.y + t * s.width + j, d_u * load(d.gate + j));
    store(d.z + j, d_u * load(y + j) * load(d.gate_slope + j));
  }
  g.write_heads(d.z, d.d_zxbcdt, d.at + t);
}

// The gradients of a head's dt and of the logarithms of its decays, `l`.
struct StepGradients {
  float dt[kChunk];
  double log[kChunk];
};

// Within the chunk: d.scores, d.mixing (scores times decays, for d x), and those of the steps.
INLINE void within_backward(Gradients& d, int64_t h, StepGradients& steps) {
  Group& g = d.g;
  const Shape& s = g.shape;
  const HeadDecays& decays = g.decays[h];
  const float *dy = d.y + h * s.head_width, *decay_ij = d.head_decays(h);
  const Ints lane = lanes<Ints, kLanes>();
  // dy_i . x_j on and below the diagonal
  for (int64_t half = 0; half < d.tiles; half += kPad) {
    const int64_t rows = smaller(kPad, d.tiles - half), at = half * kChunk;
    product({dy + half * s.width, s.width, 1}, d.x_columns, kChunk, rows, s.head_dim, half + kPad,
            [&](int64_t i, int64_t j, Floats value)
                __attribute__((always_inline)) { store(d.squares + at + i * kChunk + j, value); });
  }
  Floats columns[kChunk / kLanes] = {}, diagonals[kChunk / kLanes] = {};
  for (int64_t i = 0; i < d.tiles; i += 4) {
    Floats rows[4] = {};
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t j = 0; j <= i + r; j += kLanes) {
        const int64_t k = (i + r) * kChunk + j;
        const Floats decay = load(decay_ij + k), square = load(d.squares + k),
                     dt = load(decays.dt + j);
        const Floats own = load(g.scores + k) * decay;
        const Floats mixed = decay == 0.0f ? decay : own;
        const Floats part = decay == 0.0f ? decay : own * square;
        store(d.g.mixing + k, mixed);
        store(d.scores + k, load(d.scores + k) + (decay == 0.0f ? decay : decay * square * dt));
        // A term is added to l_i and subtracted from l_j: on the diagonal it cancels.
        const Ints diagonal = lane == static_cast<int32_t>(i + r - j);
        const Floats apart = diagonal ? fill(0.0f) : part;
        columns[j / kLanes] += apart;
        diagonals[j / kLanes] += part - apart;
        rows[r] += apart * dt;
      }
    float row_sums[4];
    store(row_sums, sums(rows[0], rows[1], rows[2], rows[3]));
    for (int64_t r = 0; r < 4; ++r) steps.log[i + r] += row_sums[r];
  }
  for (int64_t j = 0; j < kChunk; j += kLanes) {
    store(d.score_sums + j, columns[j / kLanes] * load(decays.dt + j));
    store(steps.dt + j, columns[j / kLanes] + diagonals[j / kLanes]);
  }
  for (int64_t j = 0; j < d.rows; ++j) steps.log[j] -= d.score_sums[j];
}

// columns[n, t] += sum_p states[n, p] factor[t] from[p, t], of one head.
INLINE void add_columns(const Group& g, const float* states, const float* from, const float* factor,
                        float* columns) {
  product({states, g.shape.width, 1}, from, kChunk, g.shape.state_width, g.shape.head_dim, kChunk,
          [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
            float* to = columns + i * kChunk + j;
            store(to, load(to) + value * load(factor + j));
          });
}

// Backward of y += exp(l) C S, the contribution of the entering state.
INLINE void entering_backward(Gradients& d, int64_t h, StepGradients& steps) {
  Group& g = d.g;
  const Shape& s = g.shape;
  const int64_t at = h * s.head_width;
  const HeadDecays& decays = g.decays[h];
  add_columns(g, d.state + at, d.y_columns, decays.opened, d.c_columns);
  g.scale_rows(d.y + at, s.width, decays.opened, d.tiles);
  product({g.c_columns, kChunk, 1}, g.scaled, s.head_width, s.state_width, d.tiles, s.head_width,
          [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
            const int64_t place = i * s.width + at + j;
            if (d.left) value += load(d.leaving + place) * decays.passed;
            store(d.entering + place, value);
          });
  float dots[kChunk];
  row_dots(d.y + at, s.width, d.read + at, s.width, d.tiles, s.head_width, dots);
  for (int64_t t = 0; t < d.rows; ++t) steps.log[t] += dots[t];
}

// Backward of S' = exp(l_last) S + B^T (kept dt x), the leaving state; d.added: that of dt x.
INLINE void leaving_backward(Gradients& d, int64_t h, StepGradients& steps) {
  Group& g = d.g;
  const Shape& s = g.shape;
  const int64_t at = h * s.head_width;
  const HeadDecays& decays = g.decays[h];
  float factor[kChunk];
  for (int64_t t = 0; t < kChunk; ++t) factor[t] = decays.kept[t] * decays.dt[t];
  add_columns(g, d.leaving + at, d.x_columns, factor, d.b_columns);
  product({g.b(), s.channels, 1}, d.leaving + at, s.width, d.tiles, s.state, s.head_width,
          [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
            store(d.added + i * s.head_width + j, value * decays.kept[i]);
          });
  float dots[kChunk];
  row_dots(d.added, s.head_width, g.act + at, s.channels, d.tiles, s.head_width, dots);
  double total = 0.0;
  for (int64_t t = 0; t < d.rows; ++t) {
    const double part = static_cast<double>(dots[t]) * decays.dt[t];
    steps.dt[t] += dots[t];
    steps.log[t] -= part;
    total += part;
  }
  if (d.state != nullptr) {
    double passed = 0.0;
    for (int64_t n = 0; n < s.state; ++n) {
      const int64_t row = n * s.width + at;
      passed += sum(dot(d.state + row, d.leaving + row, s.head_width));
    }
    total += passed * decays.passed;
  }
  steps.log[d.rows - 1] += total;
}

// Computes the gradients of dt, A and dt_bias from those of `l`.
INLINE void steps_backward(Gradients& d, int64_t h, const StepGradients& steps) {
  Group& g = d.g;
  const HeadDecays& decays = g.decays[h];
  const int64_t head = g.head(h);
  const double rate = g.given.A[head];
  double d_log = 0.0, d_rate = 0.0, d_shift = 0.0;
  for (int64_t t = d.rows - 1; t >= 0; --t) {
    d_log += steps.log[t];
    const double d_step = decays.bounded[t] ? 0.0 : d_log;
    d_rate += d_step * decays.dt[t];
    const float d_input = static_cast<float>(steps.dt[t] + d_step * rate) * decays.slope[t];
    d_shift += d_input;
    write_one(d_input, d.d_zxbcdt, d.at + t, g.dt_column() + h);
  }
  d.sums.A[head] += d_rate;
  d.sums.dt_bias[head] += d_shift;
}

INLINE void head_backward(Gradients& d, int64_t h) {
  Group& g = d.g;
  const Shape& s = g.shape;
  const int64_t at = h * s.head_width, head = g.head(h);
  const HeadDecays& decays = g.decays[h];
  transpose(g.act + at, s.channels, kChunk, s.head_width, d.x_columns, kChunk);
  transpose(d.y + at, s.width, kChunk, s.head_width, d.y_columns, kChunk);
  StepGradients steps = {};
  within_backward(d, h, steps);
  double skipped = 0.0;
  for (int64_t t = 0; t < d.rows; ++t) skipped += d.squares[t * kChunk + t];
  d.sums.D[head] += skipped;
  if (d.state != nullptr) entering_backward(d, h, steps);
  if (d.left) leaving_backward(d, h, steps);
  const float skip = g.given.D[head];
  product<Part::kUpper>(transposed(g.mixing, kChunk), d.y + at, s.width, d.tiles, d.tiles,
                        s.head_width,
                        [&](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
                          if (d.left) value += load(d.added + i * s.head_width + j);
                          const Floats dy = load(d.y + i * s.width + at + j);
                          store(d.act + i * s.channels + at + j, value * decays.dt[i] + dy * skip);
                        });
  steps_backward(d, h, steps);
}

// Writes the gradients of B and C to d.act, from those of the scores and the states.
INLINE void shared_backward(Gradients& d) {
  const Group& g = d.g;
  const Shape& s = g.shape;
  const auto add_to = [&](float* part) __attribute__((always_inline)) {
    return [&s, part](int64_t i, int64_t j, Floats value) __attribute__((always_inline)) {
      float* to = part + i * s.channels + j;
      store(to, load(to) + value);
    };
  };
  transpose(d.c_columns, kChunk, s.state_width, kChunk, d.c(), s.channels);
  transpose(d.b_columns, kChunk, s.state_width, kChunk, d.b(), s.channels);
  product<Part::kLower>({d.scores, kChunk, 1}, g.b(), s.channels, d.tiles, d.tiles, s.state_width,
                        add_to(d.c()));
  product<Part::kUpper>(transposed(d.scores, kChunk), g.c(), s.channels, d.tiles, d.tiles,
                        s.state_width, add_to(d.b()));
}

// Computes the gradients of the convolution's input and parameters from d.act, that of silu(conv).
INLINE void convolution_backward(Gradients& d) {
  const Group& g = d.g;
  const Shape& s = g.shape;
  const int64_t window = g.sizes.window;
  // The next chunk's first rows are moved after this chunk's rows.
  float* below = d.pre + d.rows * s.channels;
  if (d.left) {
    copy(d.pre, s.before * s.channels, below);
  } else {
    clear(below, s.before * s.channels);
  }
  for (int64_t j = 0; j < d.rows * s.channels; j += kLanes)
    store(d.pre + j, load(d.act + j) * load(d.slope + j));
  for (int64_t j = 0; j < s.channels; j += kLanes)
    for (int64_t k = 0; k <= window; ++k) {  // the last iteration is the bias
      Floats total = load(d.conv_sums + k * s.channels + j);
      for (int64_t t = 0; t < d.rows; ++t) {
        const Floats up = load(d.pre + t * s.channels + j);
        total += k == window ? up : up * load(g.raw + (t + k) * s.channels + j);
      }
      store(d.conv_sums + k * s.channels + j, total);
    }
  for (int64_t t = 0; t < d.rows; ++t) {
    float* row = d.act + t * s.channels;
    for (int64_t j = 0; j < s.channels; j += kLanes) {
      Floats total = {};
      for (int64_t k = 0; k < window; ++k)
        total +=
            load(g.taps + k * s.channels + j) * load(d.pre + (t + s.before - k) * s.channels + j);
      store(row + j, total);
    }
    for (int64_t index = 0; index < g.num_segments(); ++index) {
      const Segment part = g.segment(index);
      write(row + part.place, part.length, d.d_zxbcdt, d.at + t, part.source);
    }
  }
}

INLINE void chunk_backward(Gradients& d, int64_t begin) {
  Group& g = d.g;
  const Shape& s = g.shape;
  for (int64_t t = 0; t < d.rows; ++t) g.prefetch_heads(d.d_out, d.at + t);
  g.convolve(d.at, d.rows, begin, d.at - kChunk, s.channels, d.slope);
  g.decay(d.at, d.rows);
  g.score(d.tiles);
  transpose(g.c(), s.channels, kChunk, s.state_width, g.c_columns, kChunk);
  for (int64_t h = 0; h < s.ratio; ++h) {
    g.decay_matrix(g.decays[h], d.tiles, d.head_decays(h));
    g.mix(h, d.tiles, d.head_decays(h), d.state, d.read);
  }
  for (int64_t t = 0; t < d.rows; ++t) gate_backward(d, t);
  clear(d.y + d.rows * s.width, (kChunk - d.rows) * s.width);

  clear(d.scores, kSquare);
  clear(d.b_columns, kChunk * s.state_width);
  clear(d.c_columns, kChunk * s.state_width);
  for (int64_t h = 0; h < s.ratio; ++h) head_backward(d, h);
  shared_backward(d);
  convolution_backward(d);
  float* const entering = d.entering;
  d.entering = d.leaving;
  d.leaving = entering;
}

// Adds the float sums to the double sums, and clears them.
INLINE void flush(Gradients& d) {
  const Group& g = d.g;
  const Shape& s = g.shape;
  const int64_t window = g.sizes.window;
  for (int64_t index = 0; index < g.num_segments(); ++index) {
    const Segment part = g.segment(index);
    for (int64_t c = 0; c < part.length; ++c) {
      const int64_t channel = part.source - g.sizes.inner() + c, place = part.place + c;
      for (int64_t k = 0; k < window; ++k)
        d.sums.conv_weight[channel * window + k] += d.conv_sums[k * s.channels + place];
      d.sums.conv_bias[channel] += d.conv_sums[window * s.channels + place];
    }
  }
  for (int64_t h = 0; h < s.ratio; ++h)
    for (int64_t c = 0; c < s.head_dim; ++c)
      d.sums.norm_weight[g.first_column() + h * s.head_dim + c] +=
          d.weight_sums[h * s.head_width + c];
  clear(d.conv_sums, (window + 1) * s.channels);
  clear(d.weight_sums, s.width);
}

// Computes the states before chunks [first, end) of a document; the first one is `entering`. Each
// is passed to `place`, which returns the address of the next one.
template <typename Place>
INLINE void sweep(Group& g, Document document, int64_t first, int64_t end, const float* entering,
                  const Place& place) {
  for (int64_t chunk = first; chunk + 1 < end; ++chunk) {
    const int64_t at = document.begin + chunk * kChunk;
    g.convolve(at, kChunk, document.begin, at + kChunk, g.shape.width + g.shape.state_width,
               nullptr);
    g.decay(at, kChunk);
    transpose(g.b(), g.shape.channels, kChunk, g.shape.state_width, g.b_columns, kChunk);
    float* after = place(chunk + 1);
    g.advance(kChunk, entering, after);
    entering = after;
  }
}

INLINE void document_backward(Gradients& d, Document document) {
  Group& g = d.g;
  const int64_t size = g.shape.states;
  const int64_t chunks = chunks_of(document), parts = parts_of(chunks);
  // A part's first state is computed from the previous one, in place until the part starts.
  for (int64_t part = 1; part < parts; ++part) {
    float* to = d.firsts + part * size;
    sweep(g, document, (part - 1) * kHeldStates, part * kHeldStates + 1,
          part == 1 ? nullptr : to - size, [&](int64_t) { return to; });
  }
  for (int64_t part = parts - 1; part >= 0; --part) {
    const int64_t first = part * kHeldStates, end = smaller(chunks, first + kHeldStates);
    const float* entering = part == 0 ? nullptr : d.firsts + part * size;
    const auto place = [&](int64_t chunk) { return d.held + (chunk - first) * size; };
    sweep(g, document, first, end, entering, place);
    for (int64_t chunk = end - 1; chunk >= first; --chunk) {
      d.at = document.begin + chunk * kChunk;
      d.rows = smaller(kChunk, document.end - d.at);
      d.tiles = whole_tiles(d.rows);
      d.left = chunk + 1 < chunks;
      d.state = chunk == first ? entering : place(chunk);
      chunk_backward(d, document.begin);
    }
    flush(d);
  }
}

void run(const Sizes& sizes, const Parameters<const float>& parameters, const Task& task,
         const Rows& zxbcdt, const Rows& d_out, const Rows& d_zxbcdt,
         const Parameters<double>& sums) {
  [[maybe_unused]] const FlushDenormals flush;
  int64_t chunks = 0;
  for (int64_t index = 0; index < task.count; ++index)
    chunks = larger(chunks, chunks_of(task.documents[index]));
  const int64_t held = smaller(chunks, kHeldStates), parts = parts_of(chunks);
  const int64_t states = Shape(sizes).states;
  Group g(sizes, parameters, zxbcdt, task.group,
          Gradients::floats(sizes) + (held + parts) * states);
  Gradients d(g, sums, d_out, d_zxbcdt);
  d.held = g.memory.take(held * states);
  d.firsts = g.memory.take(parts * states);
  for (int64_t index = 0; index < task.count; ++index) document_backward(d, task.documents[index]);
}

}  // namespace

const Backward backward = run;

}  // namespace nemocascade::mamba2::NEMOCASCADE_LEVEL
