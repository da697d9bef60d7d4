// Products of bfloat16 matrices into float32 by oneDNN's kernel for one tile, which torch exports.
// Every sum over the rows has the same order for any tile, so it does not depend on the threads.
#pragma once

#include <cstdint>

#include "common/blas.h"

namespace nemocascade::tile_product {

// Rows of `left` and `right` that are packed at once, and at most in one tile; both are even.
constexpr int64_t kSlabRows = 2048, kDepth = 512;
// Shape of a task's share of the result, and the columns of a tile.
constexpr int64_t kTaskRows = 64, kTaskColumns = 512, kColumns = 128;

// True if torch exports the kernel. It may still refuse the processor, by an exception.
bool is_exported();

// Elements that hold `columns` columns of a slab after `interleave`.
int64_t packed_elements(int64_t rows, int64_t columns);

// Packs columns [kColumns * block, ...) of `rows` rows: pairs of rows are interleaved, as the
// kernel reads them.
void interleave(blas::Matrix<uint16_t> right, int64_t rows, int64_t columns, int64_t block,
                uint16_t* packed);

// Adds to, or overwrites, out [first_row + kTaskRows, first_column + kTaskColumns], cut to [m, n]:
// the product over a slab of `rows` rows. left is [rows, m]; packed holds right [rows, n]; scratch
// holds kTaskRows * kDepth elements.
void multiply(blas::Matrix<uint16_t> left, const uint16_t* packed, int64_t rows, int64_t m,
              int64_t n, int64_t first_row, int64_t first_column, bool add, uint16_t* scratch,
              float* out);

// Releases what the kernel holds of this thread's processor. Call it after the thread's last tile.
void release();

}  // namespace nemocascade::tile_product
