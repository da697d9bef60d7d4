#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <string>
#include <vector>

#include "common/levels.h"
#include "mamba_core/core.h"
#include "mamba_core/schedule.h"

namespace {

using namespace nemocascade::mamba_core;
using nemocascade::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Data of a contiguous CPU tensor of this type that holds `elements` elements.
template <typename T>
T* data(const Tensor& tensor, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                      tensor.numel() == elements,
                  name, " must be a contiguous CPU tensor of ", elements, " elements");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Rows rows(const Tensor& tensor, bool is_bf16, int64_t count, int64_t columns, const char* name) {
  const ScalarType type = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == count &&
                      tensor.size(1) == columns && tensor.scalar_type() == type &&
                      (tensor.stride(1) == 1 || columns == 1),
                  name, " must be a CPU matrix [", count, ", ", columns,
                  "] with contiguous rows, all of them float32 or all bfloat16");
  return {tensor.mutable_data_ptr(), tensor.stride(0), is_bf16};
}

// The documents of cu_seqlens [D + 1], int32, which must rise from 0 to `total`.
std::vector<Document> documents_of(const Tensor& cu_seqlens, int64_t total) {
  const int64_t count = cu_seqlens.numel() - 1;
  const int32_t* bounds = data<int32_t>(cu_seqlens, ScalarType::Int, count + 1, "cu_seqlens");
  STD_TORCH_CHECK(count >= 1 && bounds[0] == 0 && bounds[count] == total,
                  "cu_seqlens must begin with 0 and end with ", total);
  std::vector<Document> documents;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(bounds[i] < bounds[i + 1], "cu_seqlens must rise: document ", i, " has ",
                    bounds[i + 1] - bounds[i], " rows");
    documents.push_back({bounds[i], bounds[i + 1]});
  }
  return documents;
}

// One thread's tasks come from a common counter, so that none waits for another's long document.
template <typename F>
void for_each_task(const std::vector<Document>& documents, const std::vector<Range>& ranges,
                   int64_t groups, const F& run) {
  const int64_t count = groups * static_cast<int64_t>(ranges.size());
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) {
      const auto range = static_cast<size_t>(task / groups);
      run(range, Task{documents.data() + ranges[range].first, ranges[range].count, task % groups});
    }
  });
}

// Views of a [elements of all parameters] buffer, in the order of Parameters.
template <typename T>
Parameters<T> split(const Sizes& s, T* buffer) {
  const auto take = [&](int64_t count) {
    T* piece = buffer;
    buffer += count;
    return piece;
  };
  // In braces, members are made in their order.
  return {take(s.channels() * s.window),
          take(s.channels()),
          take(s.heads),
          take(s.heads),
          take(s.heads),
          take(s.inner())};
}

int64_t parameter_count(const Sizes& s) {
  return s.channels() * (s.window + 1) + 3 * s.heads + s.inner();
}

Sizes sizes_of(int64_t heads, int64_t head_dim, int64_t groups, int64_t state, int64_t window,
               double dt_low, double dt_high, double eps) {
  STD_TORCH_CHECK(heads >= 1 && head_dim >= 1 && groups >= 1 && state >= 1 && window >= 1 &&
                      heads % groups == 0 && window <= kLargestWindow,
                  "heads(", heads, "), head_dim(", head_dim, "), groups(", groups, "), state(",
                  state, ") and window(", window,
                  ") must be at least 1, heads a multiple of groups, window at most ",
                  kLargestWindow);
  return {heads,
          head_dim,
          groups,
          state,
          window,
          static_cast<float>(dt_low),
          static_cast<float>(dt_high),
          static_cast<float>(eps)};
}

// The functions of a level; an empty name is this processor's best.
Functions functions_named(const std::string& level) {
  const Functions found = functions_of(level.empty() ? nemocascade::best_level() : level.c_str());
  STD_TORCH_CHECK(found.forward != nullptr, "this processor or build has no level ", level,
                  ": leave it empty");
  return found;
}

void run_forward(const Sizes& s, const Tensor& zxbcdt, const Tensor& parameters,
                 const std::vector<Document>& documents, const std::string& level,
                 const Tensor& out) {
  const bool is_bf16 = zxbcdt.scalar_type() == ScalarType::BFloat16;
  const int64_t total = zxbcdt.size(0);
  const Rows from = rows(zxbcdt, is_bf16, total, s.columns(), "zxbcdt");
  const Rows to = rows(out, is_bf16, total, s.inner(), "out");
  const auto given = split<const float>(
      s, data<float>(parameters, ScalarType::Float, parameter_count(s), "parameters"));
  const Functions chosen = functions_named(level);
  for_each_task(documents, cut(documents), s.groups,
                [&](size_t, const Task& task) { chosen.forward(s, given, task, from, to); });
}

void mamba_core(const Tensor& zxbcdt, const Tensor& parameters, const Tensor& cu_seqlens,
                int64_t heads, int64_t head_dim, int64_t groups, int64_t state, int64_t window,
                double dt_low, double dt_high, double eps, std::string level, Tensor out) {
  const Sizes s = sizes_of(heads, head_dim, groups, state, window, dt_low, dt_high, eps);
  run_forward(s, zxbcdt, parameters, documents_of(cu_seqlens, zxbcdt.size(0)), level, out);
}

// Documents going_on[i] continue from inputs[i], [K - 1, W], and states[i], [heads, head_dim, N].
// left [D, heads, head_dim, N]: receives the state after each document.
void mamba_core_onward(const Tensor& zxbcdt, const Tensor& parameters, const Tensor& cu_seqlens,
                       int64_t heads, int64_t head_dim, int64_t groups, int64_t state,
                       int64_t window, double dt_low, double dt_high, double eps, std::string level,
                       const Tensor& going_on, const Tensor& inputs, const Tensor& states,
                       Tensor left, Tensor out) {
  const Sizes s = sizes_of(heads, head_dim, groups, state, window, dt_low, dt_high, eps);
  auto documents = documents_of(cu_seqlens, zxbcdt.size(0));
  const int64_t count = going_on.numel(), before = (s.window - 1) * s.channels();
  const int64_t per_state = s.inner() * s.state;
  const int64_t* which = data<int64_t>(going_on, ScalarType::Long, count, "going_on");
  const float* all_inputs = data<float>(inputs, ScalarType::Float, count * before, "inputs");
  const float* all_states = data<float>(states, ScalarType::Float, count * per_state, "states");
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(which[i] >= 0 && which[i] < static_cast<int64_t>(documents.size()),
                    "going_on names document ", which[i], " of ", documents.size());
    Document& document = documents[static_cast<size_t>(which[i])];
    document.inputs = all_inputs + i * before;
    document.state = all_states + i * per_state;
  }
  float* after = data<float>(left, ScalarType::Float,
                             static_cast<int64_t>(documents.size()) * per_state, "left");
  for (Document& document : documents) {
    document.left = after;
    after += per_state;
  }
  run_forward(s, zxbcdt, parameters, documents, level, out);
}

void mamba_core_backward(const Tensor& zxbcdt, const Tensor& parameters, const Tensor& cu_seqlens,
                         int64_t heads, int64_t head_dim, int64_t groups, int64_t state,
                         int64_t window, double dt_low, double dt_high, double eps,
                         std::string level, const Tensor& d_out, Tensor d_zxbcdt,
                         Tensor d_parameters) {
  const Sizes s = sizes_of(heads, head_dim, groups, state, window, dt_low, dt_high, eps);
  const bool is_bf16 = zxbcdt.scalar_type() == ScalarType::BFloat16;
  const int64_t total = zxbcdt.size(0), count = parameter_count(s);
  const Rows from = rows(zxbcdt, is_bf16, total, s.columns(), "zxbcdt");
  const Rows upstream = rows(d_out, is_bf16, total, s.inner(), "d_out");
  const Rows to = rows(d_zxbcdt, is_bf16, total, s.columns(), "d_zxbcdt");
  const auto given =
      split<const float>(s, data<float>(parameters, ScalarType::Float, count, "parameters"));
  float* wanted = data<float>(d_parameters, ScalarType::Float, count, "d_parameters");
  const auto documents = documents_of(cu_seqlens, total);
  const auto ranges = cut(documents);
  const Functions chosen = functions_named(level);
  // A sum for each range, added in their order: the same for any number of threads.
  std::vector<double> sums(ranges.size() * static_cast<size_t>(count));
  for_each_task(documents, ranges, s.groups, [&](size_t range, const Task& task) {
    double* own = sums.data() + range * static_cast<size_t>(count);
    chosen.backward(s, given, task, from, upstream, to, split<double>(s, own));
  });
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (size_t range = 0; range < ranges.size(); ++range)
      sum += sums[range * static_cast<size_t>(count) + static_cast<size_t>(i)];
    wanted[i] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade, m) {
  m.def(
      "mamba_core(Tensor zxbcdt, Tensor parameters, Tensor cu_seqlens, int heads, int head_dim, "
      "int groups, int state, int window, float dt_low, float dt_high, float eps, "
      "str level, Tensor(a!) out) -> ()");
  m.def(
      "mamba_core_onward(Tensor zxbcdt, Tensor parameters, Tensor cu_seqlens, int heads, "
      "int head_dim, int groups, int state, int window, float dt_low, float dt_high, float eps, "
      "str level, Tensor going_on, Tensor inputs, Tensor states, Tensor(a!) left, "
      "Tensor(b!) out) -> ()");
  m.def(
      "mamba_core_backward(Tensor zxbcdt, Tensor parameters, Tensor cu_seqlens, int heads, "
      "int head_dim, int groups, int state, int window, float dt_low, float dt_high, float eps, "
      "str level, Tensor d_out, Tensor(a!) d_zxbcdt, Tensor(b!) d_parameters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade, CPU, m) {
  m.impl("mamba_core", TORCH_BOX(&mamba_core));
  m.impl("mamba_core_onward", TORCH_BOX(&mamba_core_onward));
  m.impl("mamba_core_backward", TORCH_BOX(&mamba_core_backward));
}
