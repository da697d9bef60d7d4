#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "common/levels.h"
#include "common/tensor.h"
#include "mamba2/mamba2.h"

namespace {

using namespace nemocascade::mamba2;
using nemocascade::elements;
using nemocascade::Rows;
using torch::stable::Tensor;

// Consecutive documents.
struct Range {
  int64_t first;
  int64_t count;
};

// Ranges of similar numbers of rows: at most kRanges, of at least kRangeRows rows unless the pack
// has fewer. They depend only on the documents, not on the threads, so sums over ranges in order
// are deterministic.
constexpr int64_t kRanges = 32;
constexpr int64_t kRangeRows = 256;

std::vector<Range> cut(const std::vector<Document>& documents) {
  const auto count = static_cast<int64_t>(documents.size());
  const int64_t enough = std::max(kRangeRows, (documents.back().end + kRanges - 1) / kRanges);
  std::vector<Range> ranges;
  int64_t first = 0, rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Document& document = documents[static_cast<size_t>(i)];
    rows += document.end - document.begin;
    if (rows < enough && i + 1 < count) continue;
    ranges.push_back({first, i + 1 - first});
    first = i + 1;
    rows = 0;
  }
  return ranges;
}

// Calls run(range, task) for each group of each range. Threads take tasks from a common counter, so
// that none waits for another's long document.
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

// The documents of cu_seqlens [D + 1], int32, which must increase from 0 to `total`.
std::vector<Document> documents_of(const Tensor& cu_seqlens, int64_t total) {
  const int64_t count = cu_seqlens.numel() - 1;
  const int32_t* bounds = elements<int32_t>(cu_seqlens, count + 1, "cu_seqlens");
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

// Views of a buffer [elements of all parameters], in the order of Parameters.
template <typename T>
Parameters<T> split(const Sizes& s, T* buffer) {
  const auto take = [&](int64_t count) {
    T* taken = buffer;
    buffer += count;
    return taken;
  };
  // In braces, members are initialised in order.
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

// The element of an optional tensor [D, per_document] for each document, or null for all.
template <typename T>
void give(const std::optional<Tensor>& tensor, int64_t per_document, const char* name,
          std::vector<Document>& documents, T* Document::* member) {
  if (!tensor.has_value()) return;
  const auto count = static_cast<int64_t>(documents.size());
  T* data = elements<float>(*tensor, count * per_document, name);
  for (Document& document : documents) {
    document.*member = data;
    data += per_document;
  }
}

void mamba2(const Tensor& zxbcdt, const Tensor& parameters, const Tensor& cu_seqlens, int64_t heads,
            int64_t head_dim, int64_t groups, int64_t state, int64_t window, double dt_low,
            double dt_high, double eps, const std::optional<Tensor>& initial_conv,
            const std::optional<Tensor>& initial_ssm, std::optional<Tensor> final_ssm, Tensor out) {
  const Sizes s = sizes_of(heads, head_dim, groups, state, window, dt_low, dt_high, eps);
  const bool bf16 = nemocascade::is_bf16(zxbcdt);
  const int64_t total = zxbcdt.size(0), count = parameter_count(s);
  const Rows from = nemocascade::rows_of(zxbcdt, bf16, total, s.columns(), "zxbcdt");
  const Rows to = nemocascade::rows_of(out, bf16, total, s.inner(), "out");
  const auto given = split<const float>(s, elements<float>(parameters, count, "parameters"));
  auto documents = documents_of(cu_seqlens, total);
  const int64_t per_state = s.inner() * s.state;
  give(initial_conv, (s.window - 1) * s.channels(), "initial_conv", documents, &Document::inputs);
  give(initial_ssm, per_state, "initial_ssm", documents, &Document::state);
  give(final_ssm, per_state, "final_ssm", documents, &Document::final_state);
  const Forward run = NEMOCASCADE_BEST_OF(nemocascade::mamba2, forward);
  for_each_task(documents, cut(documents), s.groups,
                [&](size_t, const Task& task) { run(s, given, task, from, to); });
}

void mamba2_backward(const Tensor& zxbcdt, const Tensor& parameters, const Tensor& cu_seqlens,
                     int64_t heads, int64_t head_dim, int64_t groups, int64_t state, int64_t window,
                     double dt_low, double dt_high, double eps, const Tensor& d_out,
                     Tensor d_zxbcdt, Tensor d_parameters) {
  const Sizes s = sizes_of(heads, head_dim, groups, state, window, dt_low, dt_high, eps);
  const bool bf16 = nemocascade::is_bf16(zxbcdt);
  const int64_t total = zxbcdt.size(0), count = parameter_count(s);
  const Rows from = nemocascade::rows_of(zxbcdt, bf16, total, s.columns(), "zxbcdt");
  const Rows upstream = nemocascade::rows_of(d_out, bf16, total, s.inner(), "d_out");
  const Rows to = nemocascade::rows_of(d_zxbcdt, bf16, total, s.columns(), "d_zxbcdt");
  const auto given = split<const float>(s, elements<float>(parameters, count, "parameters"));
  float* wanted = elements<float>(d_parameters, count, "d_parameters");
  const auto documents = documents_of(cu_seqlens, total);
  const auto ranges = cut(documents);
  const Backward run = NEMOCASCADE_BEST_OF(nemocascade::mamba2, backward);
  // A sum for each range, added in order: deterministic for any number of threads.
  std::vector<double> sums(ranges.size() * static_cast<size_t>(count));
  for_each_task(documents, ranges, s.groups, [&](size_t range, const Task& task) {
    double* own = sums.data() + range * static_cast<size_t>(count);
    run(s, given, task, from, upstream, to, split<double>(s, own));
  });
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (size_t range = 0; range < ranges.size(); ++range)
      sum += sums[range * static_cast<size_t>(count) + static_cast<size_t>(i)];
    wanted[i] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "mamba2(Tensor zxbcdt, Tensor parameters, Tensor cu_seqlens, int heads, int head_dim, "
      "int groups, int state, int window, float dt_low, float dt_high, float eps, "
      "Tensor? initial_conv, Tensor? initial_ssm, Tensor(a!)? final_ssm, Tensor(b!) out) -> ()");
  m.def(
      "mamba2_backward(Tensor zxbcdt, Tensor parameters, Tensor cu_seqlens, int heads, "
      "int head_dim, int groups, int state, int window, float dt_low, float dt_high, float eps, "
      "Tensor d_out, Tensor(a!) d_zxbcdt, Tensor(b!) d_parameters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("mamba2", TORCH_BOX(&mamba2));
  m.impl("mamba2_backward", TORCH_BOX(&mamba2_backward));
}
