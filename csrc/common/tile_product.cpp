#include "common/tile_product.h"

#include <algorithm>

// libtorch_cpu exports them, see ATen/native/CPUBlas.h. The names contain the types of the
// arguments, so a torch with another interface has no such symbols.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                  int64_t ldc, bool add, const c10::BFloat16* a,
                                  const c10::BFloat16* b, float* c, bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace nemocascade::tile_product {
namespace {

constexpr int64_t kLanes = 8;
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));

int64_t even(int64_t rows) { return rows + rows % 2; }

Halves load(const uint16_t* data) {
  Halves values;
  __builtin_memcpy(&values, data, sizeof(values));
  return values;
}

void store(uint16_t* data, Halves values) { __builtin_memcpy(data, &values, sizeof(values)); }

Halves low(Halves a, Halves b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
Halves high(Halves a, Halves b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
Words low(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
Words high(Words a, Words b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
Longs low(Longs a, Longs b) { return __builtin_shufflevector(a, b, 0, 2); }
Longs high(Longs a, Longs b) { return __builtin_shufflevector(a, b, 1, 3); }

template <typename To, typename From>
To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 8.
void transpose_block(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  Words pairs[8];
  for (int64_t i = 0; i < 4; ++i) {
    const Halves a = load(from + 2 * i * from_stride), b = load(from + (2 * i + 1) * from_stride);
    pairs[i] = bits_as<Words>(low(a, b));
    pairs[i + 4] = bits_as<Words>(high(a, b));
  }
  for (int64_t part = 0; part < 2; ++part) {
    const Words* p = pairs + 4 * part;
    const Longs first[] = {bits_as<Longs>(low(p[0], p[1])), bits_as<Longs>(high(p[0], p[1]))};
    const Longs second[] = {bits_as<Longs>(low(p[2], p[3])), bits_as<Longs>(high(p[2], p[3]))};
    for (int64_t i = 0; i < 2; ++i) {
      uint16_t* row = to + (4 * part + 2 * i) * to_stride;
      store(row, bits_as<Halves>(low(first[i], second[i])));
      store(row + to_stride, bits_as<Halves>(high(first[i], second[i])));
    }
  }
}

// to [columns, even(rows)] = from [rows, columns] transposed, with a zero for an odd last row.
void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to) {
  const int64_t depth = even(rows);
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole_rows; i += kLanes) {
    for (int64_t j = 0; j < whole_columns; j += kLanes) {
      transpose_block(from + i * stride + j, stride, to + j * depth + i, depth);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < depth; ++i) {
      to[j * depth + i] = i < rows ? from[i * stride + j] : uint16_t{0};
    }
  }
}

}  // namespace

bool is_exported() {
  return at::native::cpublas::brgemm != nullptr && at::native::cpublas::brgemm_release != nullptr;
}

int64_t packed_elements(int64_t rows, int64_t columns) { return even(rows) * columns; }

void interleave(blas::Matrix<uint16_t> right, int64_t rows, int64_t columns, int64_t block,
                uint16_t* packed) {
  const int64_t first = block * kColumns, width = std::min(kColumns, columns - first);
  uint16_t* to = packed + first * even(rows);
  for (int64_t i = 0; i < rows; i += 2, to += 2 * width) {
    const uint16_t* upper = right.data + i * right.stride + first;
    const uint16_t* lower = i + 1 < rows ? upper + right.stride : nullptr;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      const Halves a = load(upper + j), b = lower == nullptr ? Halves{} : load(lower + j);
      store(to + 2 * j, low(a, b));
      store(to + 2 * j + kLanes, high(a, b));
    }
    for (; j < width; ++j) {
      to[2 * j] = upper[j];
      to[2 * j + 1] = lower == nullptr ? uint16_t{0} : lower[j];
    }
  }
}

void multiply(blas::Matrix<uint16_t> left, const uint16_t* packed, int64_t rows, int64_t m,
              int64_t n, int64_t first_row, int64_t first_column, bool add, uint16_t* scratch,
              float* out) {
  const int64_t height = std::min(kTaskRows, m - first_row);
  const int64_t end = std::min(first_column + kTaskColumns, n);
  for (int64_t i = 0; i < rows; i += kDepth) {
    const int64_t count = std::min(kDepth, rows - i), depth = even(count);
    transpose(left.data + i * left.stride + first_row, left.stride, count, height, scratch);
    for (int64_t j = first_column; j < end; j += kColumns) {
      const int64_t width = std::min(kColumns, n - j);
      at::native::cpublas::brgemm(
          height, width, depth, depth, width, n, add || i > 0,
          reinterpret_cast<const c10::BFloat16*>(scratch),
          reinterpret_cast<const c10::BFloat16*>(packed + j * even(rows) + i * width),
          out + first_row * n + j, true);
    }
  }
}

void release() { at::native::cpublas::brgemm_release(true); }

}  // namespace nemocascade::tile_product
