// Decode operators, one token for each of many sequences, on the CPU in float32.
//
// They are batch-invariant: a row's result comes from the same operations in the same order for any
// other rows. All matrices are contiguous and row-major.
#pragma once

#include <cstdint>

#include "common/tables.h"

namespace nemocascade::decode_step {

// out[m, n] = residual[m, n] + sum_k x[m][k] w[n, k], for columns [begin, end).
// x: pointers to rows. residual: null for zeros; it may be `out`.
struct Product {
  const float* const* x;
  const float* w;
  int64_t rows, depth, columns;
  const float* residual;
  float* out;
};

struct RowSteps {
  void (*product)(const Product& p, int64_t begin, int64_t end);

  // out = x / sqrt(mean(x^2) + eps) * weight, for rows [begin, end) of x [., depth].
  void (*rms_norm)(const float* x, const float* weight, int64_t depth, float eps, int64_t begin,
                   int64_t end, float* out);

  // scores = sigmoid(logits), or softmax over each row of `count`, for `rows` rows.
  void (*scores)(const float* logits, int64_t rows, int64_t count, bool softmax, float* out);
};

// A token of one row of logits [vocabulary], and its log-probability under softmax(logits scale).
// u in [0, 1) inverts the cumulative distribution over ids below `limit` that `allowed` (null for
// all) allows; a negative one takes the largest logit, the first of equals.
// scratch: a double for every kDrawBlock ids.
constexpr int64_t kDrawBlock = 64;
using Draw = void (*)(const float* logits, int64_t vocabulary, float scale, double u, int64_t limit,
                      const bool* allowed, double* scratch, int64_t* token, float* logprob);

// Mamba-2's mixer between its projections; see op.py. W = heads head_dim + 2 groups state.
struct Mamba {
  int64_t heads, head_dim, groups, state, width;  // width: of the convolution
  float dt_low, dt_high, eps;
  const float *conv_weight, *conv_bias;  // [W, width], [W]
  const float *dt_bias, *a, *d;          // [heads]
  const float* norm_weight;              // [heads head_dim]

  int64_t inner() const { return heads * head_dim; }
  int64_t channels() const { return inner() + 2 * groups * state; }
  int64_t group_width() const { return inner() / groups; }
  // Number of scratch floats of a call.
  int64_t scratch() const { return group_width() + 2 * state; }
};

// Cached keys and values of one head of a sequence: token t is row t % size of block table[t /
// size], and a block's rows are contiguous.
struct Cache {
  const float *keys, *values;  // of the head, in block 0
  const int32_t* table;
  int64_t size;   // tokens of a block, a multiple of kKeysTogether
  int64_t block;  // floats from a block to the next
};
constexpr int64_t kKeysTogether = 4;

struct Mixers {
  // One row and one group. zxbcdt, out: of the row. conv: [width - 1, W] and ssm: [heads, head_dim,
  // state], of the row's slot.
  void (*mamba)(const Mamba& m, const float* zxbcdt, int64_t group, float* conv, float* ssm,
                float* scratch, float* out);

  // Attention of `ratio` query heads [ratio, dim] over the first `length` tokens of a cache.
  // scratch: [kQueriesTogether, length rounded up to kKeysAtATime].
  void (*attention)(const float* q, const Cache& cache, int64_t ratio, int64_t dim, int64_t length,
                    float* scratch, float* out);
};
constexpr int64_t kKeysAtATime = 16;
constexpr int64_t kQueriesTogether = 2;

// rows.cpp, mixers.cpp and draw.cpp are compiled once for each level of the processor.
NEMOCASCADE_LEVELS_OF(RowSteps, row_steps)
NEMOCASCADE_LEVELS_OF(Mixers, mixers)
NEMOCASCADE_LEVELS_OF(Draw, draw)

}  // namespace nemocascade::decode_step
