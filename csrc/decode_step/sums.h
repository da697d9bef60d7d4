// Functions of vectors; sums over lanes are always made in the same order.
#pragma once

#include "common/vectors.h"

namespace nemocascade::decode_step {
namespace {

typedef float Quad __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));

// The lanes of a vector folded to four.
INLINE Quad folded(Floats v) {
  const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Eight half = low + high;
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// The sums of four vectors.
INLINE Quad four_sums(Floats a, Floats b, Floats c, Floats d) {
  const Quad p = folded(a), q = folded(b), r = folded(c), s = folded(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 2, 6) +
                  __builtin_shufflevector(p, q, 1, 5, 3, 7);  // p01 q01 p23 q23
  const Quad rs =
      __builtin_shufflevector(r, s, 0, 4, 2, 6) + __builtin_shufflevector(r, s, 1, 5, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

INLINE float one_sum(Floats v) {
  const Quad q = folded(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

// `exponential` is made for numbers not far above zero.
INLINE Floats sigmoid(Floats x) {
  const Floats bounded = x < -80.0f ? fill(-80.0f) : x;
  return 1.0f / (1.0f + exponential(-bounded));
}

INLINE Floats silu(Floats x) { return x * sigmoid(x); }

}  // namespace
}  // namespace nemocascade::decode_step
