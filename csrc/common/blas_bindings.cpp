#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "common/blas.h"
#include "common/tensor.h"
#include "common/tile_product.h"

namespace {

using nemocascade::ScalarType;
using nemocascade::Tensor;

// The bits of a bfloat16 CPU matrix with contiguous rows.
nemocascade::blas::Matrix<uint16_t> matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.stride(1) == 1 &&
                      tensor.scalar_type() == ScalarType::BFloat16,
                  name, " must be a bfloat16 CPU matrix with contiguous rows");
  // BLAS has 32-bit sizes.
  STD_TORCH_CHECK(tensor.stride(0) <= std::numeric_limits<int>::max() &&
                      tensor.size(0) <= std::numeric_limits<int>::max(),
                  name, " has ", tensor.size(0), " rows, ", tensor.stride(0),
                  " elements apart: both must be below 2^31");
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.stride(0)};
}

bool has_product() { return nemocascade::blas::has_bf16_product(); }

void add_product(Tensor total, const Tensor& left, const Tensor& right, bool add) {
  STD_TORCH_CHECK(has_product(), "this torch has no such product");
  STD_TORCH_CHECK(left.size(0) == right.size(0), "left and right must have the same rows");
  const int64_t rows = left.size(0), m = left.size(1), n = right.size(1);
  nemocascade::blas::outer(matrix(left, "left"), matrix(right, "right"), rows, m, n, add,
                           nemocascade::elements<float>(total, m * n, "total"));
}

bool has_tile_product() { return nemocascade::tile_product::is_exported(); }

// Like add_product, slab by slab: the packed form of a slab stays small for any number of rows.
void add_tiles(Tensor total, const Tensor& left, const Tensor& right, bool add) {
  namespace tiles = nemocascade::tile_product;
  STD_TORCH_CHECK(has_tile_product(), "this torch has no such product");
  STD_TORCH_CHECK(left.size(0) == right.size(0), "left and right must have the same rows");
  const int64_t rows = left.size(0), m = left.size(1), n = right.size(1);
  auto from = matrix(left, "left"), with = matrix(right, "right");
  float* out = nemocascade::elements<float>(total, m * n, "total");
  if (rows == 0 && !add) std::fill_n(out, m * n, 0.0f);
  const auto packed = std::make_unique_for_overwrite<uint16_t[]>(
      tiles::packed_elements(std::min(rows, tiles::kSlabRows), n));
  const int64_t blocks = (n + tiles::kColumns - 1) / tiles::kColumns;
  const int64_t down = (m + tiles::kTaskRows - 1) / tiles::kTaskRows;
  const int64_t across = (n + tiles::kTaskColumns - 1) / tiles::kTaskColumns;
  for (int64_t i = 0; i < rows; i += tiles::kSlabRows) {
    const int64_t count = std::min(tiles::kSlabRows, rows - i);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        tiles::interleave(with, count, n, b, packed.get());
      }
    });
    torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      const auto scratch =
          std::make_unique_for_overwrite<uint16_t[]>(tiles::kTaskRows * tiles::kDepth);
      for (int64_t t = begin; t < end; ++t) {
        tiles::multiply(from, packed.get(), count, m, n, t / across * tiles::kTaskRows,
                        t % across * tiles::kTaskColumns, add || i > 0, scratch.get(), out);
      }
      tiles::release();
    });
    from.data += count * from.stride;
    with.data += count * with.stride;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def("has_product() -> bool");
  m.def("add_product_(Tensor(a!) total, Tensor left, Tensor right, bool add) -> ()");
  m.def("has_tile_product() -> bool");
  m.def("add_tiles_(Tensor(a!) total, Tensor left, Tensor right, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CompositeExplicitAutograd, m) {
  m.impl("has_product", TORCH_BOX(&has_product));
  m.impl("has_tile_product", TORCH_BOX(&has_tile_product));
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("add_product_", TORCH_BOX(&add_product));
  m.impl("add_tiles_", TORCH_BOX(&add_tiles));
}
