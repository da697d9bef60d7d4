// How bindings read the tensors of a linear head's rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "linear_logprob/rows.h"

namespace nemocascade::linear_logprob {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows that a thread takes at least: fewer cost more to hand out than to do.
constexpr int64_t kRowsAtATime = 4;

// Data of a contiguous CPU tensor of this type that holds `elements` elements.
template <typename T>
T* data(const Tensor& tensor, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                      tensor.numel() == elements,
                  name, " must be a contiguous CPU tensor of ", elements, " elements");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
Logits<T> view(const Tensor& logits, double scale) {
  return {static_cast<T*>(logits.mutable_data_ptr()), logits.stride(0), logits.size(1),
          static_cast<float>(scale)};
}

// Calls f with the logits in their element type, and the kernel of that type.
template <typename F, typename Float, typename Bfloat>
void dispatch(const Tensor& logits, double scale, Float kernel, Bfloat kernel_bf16, const F& f) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) >= 1 &&
                      (logits.size(1) == 1 || logits.stride(1) == 1),
                  "logits must be a CPU matrix with contiguous rows");
  if (logits.scalar_type() == ScalarType::Float) {
    f(view<float>(logits, scale), kernel);
  } else {
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::BFloat16,
                    "logits must be float32 or bfloat16");
    f(view<Bf16>(logits, scale), kernel_bf16);
  }
}

}  // namespace nemocascade::linear_logprob
