#include "mamba2/group.h"

namespace nemocascade::mamba2::NEMOCASCADE_LEVEL {
namespace {

// The gated norm of row t of y, which is row `at` of the pack. gated: memory for a row.
INLINE void gate(const Group& g, int64_t t, int64_t at, float* gated, const Rows& out) {
  const Shape& s = g.shape;
  Floats squares = {};
  g.read_heads(g.zxbcdt, at, gated);
  for (int64_t j = 0; j < s.width; j += kLanes) {
    const Floats gate = load(gated + j);
    const Floats u = load(g.y + t * s.width + j) * gate * sigmoid(gate);
    squares += u * u;
    store(gated + j, u);
  }
  const float mean = sum(squares) / static_cast<float>(s.ratio * s.head_dim);
  const float scale = 1.0f / std::sqrt(mean + g.sizes.eps);
  for (int64_t j = 0; j < s.width; j += kLanes)
    store(gated + j, load(gated + j) * scale * load(g.weight + j));
  g.write_heads(gated, out, at);
}

void run(const Sizes& sizes, const Parameters<const float>& parameters, const Task& task,
         const Rows& zxbcdt, const Rows& out) {
  [[maybe_unused]] const FlushDenormals flush;
  const Shape shape(sizes);
  Group g(sizes, parameters, zxbcdt, task.group, shape.width + kSquare + shape.states);
  float* gated = g.memory.take(shape.width);
  float* decays = g.memory.take(kSquare);
  float* state = g.memory.take(shape.states);
  for (int64_t index = 0; index < task.count; ++index) {
    const Document document = task.documents[index];
    const float* entering = nullptr;
    if (document.state != nullptr) {
      // Clear the padding of the heads, which holds the previous document's values.
      clear(state, shape.states);
      g.read_state(document.state, state);
      entering = state;
    }
    for (int64_t at = document.begin; at < document.end; at += kChunk) {
      const int64_t rows = smaller(kChunk, document.end - at), tiles = whole_tiles(rows);
      g.convolve(at, rows, document.begin, at + rows, shape.channels, nullptr, document.inputs);
      g.decay(at, rows);
      g.score(tiles);
      for (int64_t h = 0; h < shape.ratio; ++h) {
        g.decay_matrix(g.decays[h], tiles, decays);
        g.mix(h, tiles, decays, entering, nullptr);
      }
      for (int64_t t = 0; t < rows; ++t) gate(g, t, at + t, gated, out);
      if (at + kChunk < document.end || document.final_state != nullptr)
        g.advance(tiles, entering, state);
      entering = state;
    }
    if (document.final_state != nullptr) g.write_state(state, document.final_state);
  }
}

}  // namespace

const Forward forward = run;

}  // namespace nemocascade::mamba2::NEMOCASCADE_LEVEL
