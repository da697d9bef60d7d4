// Small matrices of floats: products, transposes and the sums of their rows. Widths are
// multiples of kPad.
#pragma once

#include "common/simd.h"

namespace nemocascade::mamba2::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

// Rows that a product computes at once; numbers of rows are multiples of it.
constexpr int64_t kTile = 8;
// Vectors of columns that a product computes at once: as many sums as registers can hold.
constexpr int64_t kTileVectors = kLanes == 16 ? 2 : 1;

constexpr int64_t whole_tiles(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// The left factor: element (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row;
  int64_t column;
};

INLINE Left transposed(const float* data, int64_t row) { return {data, 1, row}; }

// The non-zero part of the left factor.
enum class Part { kAll, kLower, kUpper };

template <int64_t kVectors, typename Emit>
INLINE void product_tile(Left a, const float* b, int64_t b_row, int64_t first, int64_t end,
                         int64_t i, int64_t j, const Emit& emit) {
  Floats sums[kTile][kVectors] = {};
  const float* left = a.data + i * a.row;
  for (int64_t k = first; k < end; ++k) {
    Floats right[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) right[v] = load(b + k * b_row + j + v * kLanes);
    for (int64_t r = 0; r < kTile; ++r) {
      const float factor = left[r * a.row + k * a.column];
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += right[v] * factor;
    }
  }
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t v = 0; v < kVectors; ++v) emit(i + r, j + v * kLanes, sums[r][v]);
}

// Calls emit(i, j, sum_k a[i, k] b[k, j .. j + kLanes]) for every vector of the product.
template <Part kPart = Part::kAll, typename Emit>
INLINE void product(Left a, const float* b, int64_t b_row, int64_t rows, int64_t depth,
                    int64_t width, const Emit& emit) {
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t first = kPart == Part::kUpper ? i : 0;
    const int64_t end = kPart == Part::kLower ? smaller(depth, i + kTile) : depth;
    int64_t j = 0;
    for (; j + kTileVectors * kLanes <= width; j += kTileVectors * kLanes)
      product_tile<kTileVectors>(a, b, b_row, first, end, i, j, emit);
    if (j < width) product_tile<1>(a, b, b_row, first, end, i, j, emit);
  }
}

// to[j, i] = from[i, j]. rows and columns: multiples of 4.
INLINE void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                      int64_t to_row) {
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {
      const float* at = from + i * from_row + j;
      Quad a = load_as<Quad>(at), b = load_as<Quad>(at + from_row);
      Quad c = load_as<Quad>(at + 2 * from_row), d = load_as<Quad>(at + 3 * from_row);
      transpose_quads(a, b, c, d);
      float* out = to + j * to_row + i;
      store(out, a);
      store(out + to_row, b);
      store(out + 2 * to_row, c);
      store(out + 3 * to_row, d);
    }
}

// The sum of a[j] b[j] over `width` elements, lane by lane.
INLINE Floats dot(const float* a, const float* b, int64_t width) {
  Floats total = {};
  for (int64_t j = 0; j < width; j += kLanes) total += load(a + j) * load(b + j);
  return total;
}

// out[t] = the inner product of rows t of a and b. rows: a multiple of 4.
INLINE void row_dots(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows,
                     int64_t width, float* out) {
  for (int64_t t = 0; t < rows; t += 4) {
    Floats parts[4];
    for (int64_t r = 0; r < 4; ++r) parts[r] = dot(a + (t + r) * a_row, b + (t + r) * b_row, width);
    store(out + t, sums(parts[0], parts[1], parts[2], parts[3]));
  }
}

}  // namespace nemocascade::mamba2::NEMOCASCADE_LEVEL
