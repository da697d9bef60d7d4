// Checks of torch's stable tensors, and their data for plain C++.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/logits.h"
#include "common/rows.h"

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace nemocascade {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Data of a contiguous tensor of this type, on the CPU or on a GPU, that holds `count` elements.
// `name` is for the error message.
inline void* checked_data(const Tensor& tensor, bool cuda, ScalarType type, int64_t count,
                          const char* name) {
  STD_TORCH_CHECK((cuda ? tensor.is_cuda() : tensor.is_cpu()) && tensor.is_contiguous() &&
                      tensor.scalar_type() == type && tensor.numel() == count,
                  name, " must be a contiguous ", cuda ? "CUDA" : "CPU", " tensor of ", count,
                  " elements of type ", type);
  return tensor.mutable_data_ptr();
}

template <typename T>
constexpr ScalarType type_of =
    torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;

// Data of a contiguous CPU tensor that holds `count` elements of type T.
template <typename T>
T* elements(const Tensor& tensor, int64_t count, const char* name) {
  return static_cast<T*>(checked_data(tensor, false, type_of<T>, count, name));
}

// Null if there is no tensor.
template <typename T>
T* elements(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor.has_value() ? elements<T>(*tensor, count, name) : nullptr;
}

// The same on a GPU.
template <typename T>
T* cuda_elements(const Tensor& tensor, int64_t count, const char* name) {
  return static_cast<T*>(checked_data(tensor, true, type_of<T>, count, name));
}

template <typename T>
T* cuda_elements(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor.has_value() ? cuda_elements<T>(*tensor, count, name) : nullptr;
}

inline bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// A CPU matrix [count, columns] with contiguous rows, bfloat16 or float32.
inline Rows rows_of(const Tensor& tensor, bool is_bf16, int64_t count, int64_t columns,
                    const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == count &&
                      tensor.size(1) == columns &&
                      (tensor.stride(1) == 1 || columns == 1 || count == 0) &&
                      tensor.scalar_type() == (is_bf16 ? ScalarType::BFloat16 : ScalarType::Float),
                  name, " must be a CPU matrix [", count, ", ", columns,
                  "] with contiguous rows, all of them float32 or all bfloat16");
  return {tensor.mutable_data_ptr(), tensor.stride(0), is_bf16};
}

#ifdef USE_CUDA
// The cudaStream_t on which torch enqueues work for a tensor's device.
inline void* current_cuda_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#endif

// Every id must lie in 0..last.
template <typename T>
void check_ids(const T* ids, int64_t count, int64_t last, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] <= last, name, " hold ", ids[i], ", which is not in 0..",
                    last);
  }
}

// A new 1-D int64 tensor on the device of `like`, which must be the CPU.
inline Tensor int64_tensor(const std::vector<int64_t>& values, const Tensor& like) {
  auto tensor =
      torch::stable::new_empty(like, {static_cast<int64_t>(values.size())}, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(tensor.mutable_data_ptr()));
  return tensor;
}

// Calls a row kernel, `kernel` for float32 and `kernel_bf16` for bfloat16, on ranges of the rows of
// logits [R, V], whose rows are contiguous: kernel(logits, begin, end).
template <typename Float, typename Bfloat>
void for_each_row(const Tensor& logits, double scale, Float kernel, Bfloat kernel_bf16) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) >= 1 &&
                      (logits.size(1) == 1 || logits.stride(1) == 1) &&
                      (is_bf16(logits) || logits.scalar_type() == ScalarType::Float),
                  "logits must be a float32 or bfloat16 CPU matrix with contiguous rows");
  // Minimum rows of a thread: for fewer, scheduling costs more than the work.
  constexpr int64_t kRowsAtATime = 4;
  const auto run = [&]<typename T>(T* data, auto function) {
    const Logits<T> view{data, logits.stride(0), logits.size(1), static_cast<float>(scale)};
    torch::stable::parallel_for(0, logits.size(0), kRowsAtATime,
                                [&](int64_t begin, int64_t end) { function(view, begin, end); });
  };
  if (is_bf16(logits)) {
    run(static_cast<Bf16*>(logits.mutable_data_ptr()), kernel_bf16);
  } else {
    run(static_cast<float*>(logits.mutable_data_ptr()), kernel);
  }
}

// The same with target [R] int64: kernel(logits, target, begin, end, arguments...).
template <typename Float, typename Bfloat, typename... Arguments>
void for_each_row(const Tensor& logits, const Tensor& target, double scale, Float kernel,
                  Bfloat kernel_bf16, const Arguments&... arguments) {
  const int64_t* ids = elements<int64_t>(target, logits.size(0), "target");
  const auto with_target = [&](auto function) {
    return [&, function](const auto& view, int64_t begin, int64_t end) {
      function(view, ids, begin, end, arguments...);
    };
  };
  for_each_row(logits, scale, with_target(kernel), with_target(kernel_bf16));
}

}  // namespace nemocascade
