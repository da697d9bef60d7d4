#include <cmath>

#include "common/simd.h"
#include "decode_step/step.h"

namespace nemocascade::decode_step::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

static_assert(kDrawBlock % kLanes == 0);

// exp(logits scale - top) of a vector's ids, 0 past the end.
INLINE Floats weights_at(const float* logits, int64_t from, int64_t end, float scale, float top) {
  const int64_t lanes = smaller(kLanes, end - from);
  const Floats x = lanes == kLanes ? load(logits + from) : load_tail(logits + from, lanes, kLowest);
  return exponential(x * scale - top);
}

INLINE Floats without(Floats weights, int64_t from, int64_t end, const bool* allowed) {
  for (int64_t i = 0; i < smaller(kLanes, end - from); ++i) {
    if (!allowed[from + i]) weights[i] = 0.0f;
  }
  return weights;
}

INLINE int64_t largest_allowed(const float* logits, int64_t limit, const bool* allowed) {
  int64_t best = 0;
  float top = kLowest;
  for (int64_t v = 0; v < limit; ++v) {
    if ((allowed == nullptr || allowed[v]) && logits[v] > top) {
      top = logits[v];
      best = v;
    }
  }
  return best;
}

// The first id at which the sum of weights exceeds u times their total. blocks: sums of kDrawBlock.
INLINE int64_t inverted(const float* logits, int64_t limit, float scale, float top, double u,
                        const bool* allowed, const double* blocks, int64_t count) {
  double total = 0.0;
  for (int64_t b = 0; b < count; ++b) total += blocks[b];
  const double target = u * total;
  double before = 0.0;
  int64_t last = 0, block = 0;
  for (; block < count; ++block) {
    if (blocks[block] > 0.0) last = block;
    if (before + blocks[block] > target) break;
    before += blocks[block];
  }
  // If rounding leaves no sum above the target, the result is the last id with a weight.
  if (block == count) {
    block = last;
    before -= blocks[last];
  }
  const int64_t first = block * kDrawBlock, end = smaller(first + kDrawBlock, limit);
  int64_t found = first;
  for (int64_t v = first; v < end; v += kLanes) {
    Floats weights = weights_at(logits, v, end, scale, top);
    if (allowed != nullptr) weights = without(weights, v, end, allowed);
    for (int64_t i = 0; i < smaller(kLanes, end - v); ++i) {
      if (weights[i] > 0.0f) found = v + i;
      before += static_cast<double>(weights[i]);
      if (before > target && weights[i] > 0.0f) return found;
    }
  }
  return found;
}

void draw_token(const float* logits, int64_t vocabulary, float scale, double u, int64_t limit,
                const bool* allowed, double* scratch, int64_t* token, float* logprob) {
  const float top = row_maximum(logits, vocabulary) * scale;
  double total = 0.0;
  for (int64_t b = 0; b * kDrawBlock < vocabulary; ++b) {
    const int64_t end = smaller((b + 1) * kDrawBlock, vocabulary);
    Floats all = {}, drawn = {};
    for (int64_t v = b * kDrawBlock; v < end; v += kLanes) {
      const Floats weights = weights_at(logits, v, end, scale, top);
      all += weights;
      if (v + kLanes <= limit && allowed == nullptr) {
        drawn += weights;
      } else if (v < limit) {
        Floats kept = allowed == nullptr ? weights : without(weights, v, end, allowed);
        for (int64_t i = limit - v; i < kLanes; ++i) kept[i] = 0.0f;
        drawn += kept;
      }
    }
    total += static_cast<double>(sum(all));
    scratch[b] = static_cast<double>(sum(drawn));
  }
  const int64_t count = (limit + kDrawBlock - 1) / kDrawBlock;
  *token = u < 0.0 ? largest_allowed(logits, limit, allowed)
                   : inverted(logits, limit, scale, top, u, allowed, scratch, count);
  *logprob =
      static_cast<float>(static_cast<double>(logits[*token] * scale - top) - std::log(total));
}

}  // namespace

const Draw draw = draw_token;

}  // namespace nemocascade::decode_step::NEMOCASCADE_LEVEL
