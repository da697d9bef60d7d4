#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/levels.h"
#include "decode_step/step.h"
#include "moe_router/router.h"

namespace {

using nemocascade::decode_step::Mamba;
using nemocascade::decode_step::Product;
using nemocascade::moe_router::Settings;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const nemocascade::decode_step::RowSteps& row_steps() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::decode_step, row_steps);
  return best;
}

const nemocascade::decode_step::Mixers& mixers() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::decode_step, mixers);
  return best;
}

// Multiplications that a thread takes at least: fewer cost more to hand out than to do.
constexpr int64_t kWork = 1 << 17;
// Columns are handed out so many at a time.
constexpr int64_t kColumns = 8;

// Data of a contiguous CPU tensor of this type that holds `elements` elements.
template <typename T>
T* data(const Tensor& tensor, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                      tensor.numel() == elements,
                  name, " must be a contiguous CPU tensor of ", elements, " elements");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

float* floats(const Tensor& tensor, int64_t elements, const char* name) {
  return data<float>(tensor, ScalarType::Float, elements, name);
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

void check_below(const int64_t* ids, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < limit, name, " hold ", ids[i], ", which is not in 0..",
                    limit - 1);
  }
}

std::vector<const float*> row_pointers(const float* x, int64_t rows, int64_t depth) {
  std::vector<const float*> pointers(rows);
  for (int64_t r = 0; r < rows; ++r) pointers[r] = x + r * depth;
  return pointers;
}

// Products of one depth and number of columns, handed out together.
void multiply(const std::vector<Product>& products) {
  if (products.empty()) return;
  const int64_t columns = products[0].columns, blocks = (columns + kColumns - 1) / kColumns;
  const auto count = static_cast<int64_t>(products.size());
  int64_t rows = 0;
  for (const Product& p : products) rows += p.rows;
  const int64_t work = rows * products[0].depth * kColumns / count;
  const auto& steps = row_steps();
  torch::stable::parallel_for(
      0, count * blocks, std::max<int64_t>(1, kWork / (work + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end;) {
          const int64_t index = at / blocks, block = at % blocks;
          const int64_t last = std::min(blocks, block + end - at);
          steps.product(products[static_cast<size_t>(index)], block * kColumns,
                        std::min(last * kColumns, columns));
          at += last - block;
        }
      });
}

Tensor step_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t rows = x.size(0), depth = x.size(1);
  Tensor out = new_matrix(x, rows, depth);
  const float* from = floats(x, rows * depth, "x");
  const float* factor = floats(weight, depth, "weight");
  float* to = floats(out, rows * depth, "out");
  row_steps().rms_norm(from, factor, depth, static_cast<float>(eps), 0, rows, to);
  return out;
}

Tensor step_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  Tensor out = new_matrix(x, rows, columns);
  const auto pointers = row_pointers(floats(x, rows * depth, "x"), rows, depth);
  multiply({{pointers.data(), floats(weight, columns * depth, "weight"), rows, depth, columns,
             residual.has_value() ? floats(*residual, rows * columns, "residual") : nullptr,
             floats(out, rows * columns, "out")}});
  return out;
}

void step_route(const Tensor& logits, const std::optional<Tensor>& bias, int64_t real, bool softmax,
                int64_t top_k, int64_t groups, int64_t top_groups, bool normalize, double scale,
                Tensor experts, Tensor weights) {
  const int64_t rows = logits.size(0), count = logits.size(1);
  const Settings settings{static_cast<int32_t>(count),
                          static_cast<int32_t>(top_k),
                          static_cast<int32_t>(groups),
                          static_cast<int32_t>(top_groups),
                          normalize,
                          static_cast<float>(scale)};
  std::vector<float> scores(rows * count);
  row_steps().scores(floats(logits, rows * count, "logits"), rows, count, softmax, scores.data());
  const float* added = bias.has_value() ? floats(*bias, count, "bias") : nullptr;
  int32_t* chosen = data<int32_t>(experts, ScalarType::Int, rows * top_k, "experts");
  float* weighed = floats(weights, rows * top_k, "weights");
  STD_TORCH_CHECK(real >= 0 && real <= rows, "real is ", real, ", which is not in 0..", rows);
  nemocascade::moe_router::choose(scores.data(), added, nullptr, nullptr, settings, 0, real, chosen,
                                  weighed);
  std::fill(chosen + real * top_k, chosen + rows * top_k, static_cast<int32_t>(count));
  std::fill(weighed + real * top_k, weighed + rows * top_k, 0.0f);
}

Tensor step_experts(const Tensor& x, const Tensor& experts, const Tensor& weights,
                    const Tensor& w_up, const Tensor& w_down, bool swiglu) {
  const int64_t tokens = x.size(0), hidden = x.size(1), top_k = experts.size(1);
  const int64_t count = w_down.size(0), width = w_down.size(2), up = swiglu ? 2 * width : width;
  const int64_t slots = tokens * top_k;
  const float* rows = floats(x, tokens * hidden, "x");
  const int32_t* ids = data<int32_t>(experts, ScalarType::Int, slots, "experts");
  const float* first = floats(w_up, count * up * hidden, "w_up");
  const float* second = floats(w_down, count * hidden * width, "w_down");
  Tensor out = new_matrix(x, tokens, hidden);

  // Slots by expert; within one they stay in order.
  std::vector<int64_t> starts(count + 2, 0);
  for (int64_t s = 0; s < slots; ++s) {
    STD_TORCH_CHECK(ids[s] >= 0 && ids[s] <= count, "experts hold ", ids[s],
                    ", which is not in 0..", count);
    ++starts[ids[s] + 1];
  }
  for (int64_t e = 0; e <= count; ++e) starts[e + 1] += starts[e];
  std::vector<int64_t> order(slots), next(starts.begin(), starts.end() - 1);
  for (int64_t s = 0; s < slots; ++s) order[next[ids[s]]++] = s;

  std::vector<const float*> sorted(slots);
  for (int64_t i = 0; i < slots; ++i) sorted[i] = rows + order[i] / top_k * hidden;
  std::vector<float> h(slots * up), y(slots * hidden), by_slot(slots * hidden);
  // The products of every expert that has slots: to[i] = w[expert] x[i] of the sorted slots i.
  const auto products = [&](const std::vector<const float*>& x, const float* w, int64_t depth,
                            int64_t columns, std::vector<float>& to) {
    std::vector<Product> found;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t begin = starts[e], n = starts[e + 1] - begin;
      if (n == 0) continue;
      found.push_back({x.data() + begin, w + e * columns * depth, n, depth, columns, nullptr,
                       to.data() + begin * columns});
    }
    return found;
  };
  multiply(products(sorted, first, hidden, up, h));
  const int64_t filled = starts[count];
  const int64_t rows_at_a_time = std::max<int64_t>(1, kWork / (up * 8 + 1));
  torch::stable::parallel_for(0, filled, rows_at_a_time, [&](int64_t begin, int64_t end) {
    if (swiglu) {
      row_steps().swiglu(h.data() + begin * up, end - begin, width);
    } else {
      row_steps().relu2(h.data() + begin * up, (end - begin) * up);
    }
  });
  const auto active = row_pointers(h.data(), slots, up);
  multiply(products(active, second, width, hidden, y));
  for (int64_t i = 0; i < filled; ++i) {
    std::copy_n(y.data() + i * hidden, hidden, by_slot.data() + order[i] * hidden);
  }
  row_steps().combine(by_slot.data(), floats(weights, slots, "weights"), ids,
                      static_cast<int32_t>(count), tokens, top_k, hidden,
                      floats(out, tokens * hidden, "out"));
  return out;
}

Tensor step_mamba(const Tensor& zxbcdt, Tensor conv_state, Tensor ssm_state, const Tensor& slots,
                  const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& dt_bias,
                  const Tensor& a, const Tensor& d, const Tensor& norm_weight, int64_t groups,
                  double dt_low, double dt_high, double eps) {
  const int64_t rows = zxbcdt.size(0), count = ssm_state.size(0);
  Mamba m{ssm_state.size(1),
          ssm_state.size(2),
          groups,
          ssm_state.size(3),
          conv_weight.size(1),
          static_cast<float>(dt_low),
          static_cast<float>(dt_high),
          static_cast<float>(eps),
          nullptr,
          nullptr,
          floats(dt_bias, ssm_state.size(1), "dt_bias"),
          floats(a, ssm_state.size(1), "A"),
          floats(d, ssm_state.size(1), "D"),
          nullptr};
  m.conv_weight = floats(conv_weight, m.channels() * m.width, "conv_weight");
  m.conv_bias = floats(conv_bias, m.channels(), "conv_bias");
  m.norm_weight = floats(norm_weight, m.inner(), "norm_weight");
  const int64_t input = m.inner() + m.channels() + m.heads;
  const int64_t conv_size = (m.width - 1) * m.channels();
  const int64_t ssm_size = m.inner() * m.state;
  const float* from = floats(zxbcdt, rows * input, "zxbcdt");
  float* conv = floats(conv_state, count * conv_size, "conv_state");
  float* ssm = floats(ssm_state, count * ssm_size, "ssm_state");
  const int64_t* at = data<int64_t>(slots, ScalarType::Long, rows, "slots");
  check_below(at, rows, count, "slots");
  Tensor out = new_matrix(zxbcdt, rows, m.inner());
  float* to = floats(out, rows * m.inner(), "out");
  const int64_t grain = std::max<int64_t>(1, kWork * m.groups / (ssm_size * 4 + 1));
  torch::stable::parallel_for(0, rows * m.groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(m.scratch());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / m.groups;
      mixers().mamba(m, from + r * input, i % m.groups, conv + at[r] * conv_size,
                     ssm + at[r] * ssm_size, scratch.data(), to + r * m.inner());
    }
  });
  return out;
}

Tensor step_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values,
                      const Tensor& slots, const Tensor& positions) {
  const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1);
  const int64_t count = keys.size(0), capacity = keys.size(2), ratio = heads / kv_heads;
  const int64_t cached = count * kv_heads * capacity * dim;
  const float* queries = floats(q, rows * heads * dim, "q");
  const float* new_keys = floats(k, rows * kv_heads * dim, "k");
  const float* new_values = floats(v, rows * kv_heads * dim, "v");
  float* all_keys = floats(keys, cached, "keys");
  float* all_values = floats(values, cached, "values");
  const int64_t* at = data<int64_t>(slots, ScalarType::Long, rows, "slots");
  const int64_t* held = data<int64_t>(positions, ScalarType::Long, rows, "positions");
  check_below(at, rows, count, "slots");
  check_below(held, rows, capacity, "positions");
  Tensor out = torch::stable::new_empty(q, {rows, heads, dim});
  float* to = floats(out, rows * heads * dim, "out");
  const int64_t longest = rows == 0 ? 0 : *std::max_element(held, held + rows) + 1;
  const int64_t grain = std::max<int64_t>(1, kWork / (longest * ratio * dim * 2 + 1));
  torch::stable::parallel_for(0, rows * kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(ratio * (longest + nemocascade::decode_step::kKeysAtATime));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / kv_heads;
      const int64_t first = (at[r] * kv_heads + i % kv_heads) * capacity * dim;
      std::copy_n(new_keys + i * dim, dim, all_keys + first + held[r] * dim);
      std::copy_n(new_values + i * dim, dim, all_values + first + held[r] * dim);
      mixers().attention(queries + i * ratio * dim, all_keys + first, all_values + first, ratio,
                         dim, held[r] + 1, scratch.data(), to + i * ratio * dim);
    }
  });
  return out;
}

void step_draw(const Tensor& logits, const std::optional<Tensor>& u, double scale, int64_t limit,
               const std::optional<Tensor>& allowed, Tensor tokens, Tensor logprobs) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(limit >= 1 && limit <= vocabulary, "limit is ", limit, ", which is not in 1..",
                  vocabulary);
  const float* from = floats(logits, rows * vocabulary, "logits");
  const double* numbers = u.has_value() ? data<double>(*u, ScalarType::Double, rows, "u") : nullptr;
  const bool* mask = allowed.has_value()
                         ? data<bool>(*allowed, ScalarType::Bool, rows * vocabulary, "allowed")
                         : nullptr;
  int64_t* to = data<int64_t>(tokens, ScalarType::Long, rows, "tokens");
  float* found = floats(logprobs, rows, "logprobs");
  const auto draw = NEMOCASCADE_BEST_OF(nemocascade::decode_step, draw);
  const int64_t grain = std::max<int64_t>(1, kWork / (vocabulary * 8));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(vocabulary / nemocascade::decode_step::kDrawBlock + 1);
    for (int64_t r = begin; r < end; ++r) {
      draw(from + r * vocabulary, vocabulary, static_cast<float>(scale),
           numbers == nullptr ? -1.0 : numbers[r], limit,
           mask == nullptr ? nullptr : mask + r * vocabulary, scratch.data(), to + r, found + r);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def("step_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("step_linear(Tensor x, Tensor weight, Tensor? residual) -> Tensor");
  m.def(
      "step_route(Tensor logits, Tensor? bias, int real, bool softmax, int top_k, int groups, int "
      "top_groups, bool normalize, float scale, Tensor(a!) experts, Tensor(b!) weights) -> ()");
  m.def(
      "step_experts(Tensor x, Tensor experts, Tensor weights, Tensor w_up, Tensor w_down, bool "
      "swiglu) -> Tensor");
  m.def(
      "step_mamba(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor slots, Tensor "
      "conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A, Tensor D, Tensor norm_weight, int "
      "groups, float dt_low, float dt_high, float eps) -> Tensor");
  m.def(
      "step_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor "
      "slots, Tensor positions) -> Tensor");
  m.def(
      "step_draw(Tensor logits, Tensor? u, float scale, int limit, Tensor? allowed, Tensor(a!) "
      "tokens, Tensor(b!) logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("step_norm", TORCH_BOX(&step_norm));
  m.impl("step_linear", TORCH_BOX(&step_linear));
  m.impl("step_route", TORCH_BOX(&step_route));
  m.impl("step_experts", TORCH_BOX(&step_experts));
  m.impl("step_mamba", TORCH_BOX(&step_mamba));
  m.impl("step_attention", TORCH_BOX(&step_attention));
  m.impl("step_draw", TORCH_BOX(&step_draw));
}
