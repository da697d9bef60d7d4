#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/expert_choice.h"
#include "common/expert_rows.h"
#include "common/levels.h"
#include "common/tensor.h"
#include "decode_step/step.h"

namespace {

using nemocascade::check_ids;
using nemocascade::elements;
using nemocascade::decode_step::Mamba;
using nemocascade::decode_step::Product;
using torch::stable::new_empty;
using torch::stable::Tensor;

const nemocascade::decode_step::RowSteps& row_steps() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::decode_step, row_steps);
  return best;
}

const nemocascade::decode_step::Mixers& mixers() {
  static const auto& best = NEMOCASCADE_BEST_OF(nemocascade::decode_step, mixers);
  return best;
}

// Minimum multiplications of a thread: for fewer, scheduling costs more than the work.
constexpr int64_t kWork = 1 << 17;
// Number of columns that a thread takes at a time.
constexpr int64_t kColumns = 8;

std::vector<const float*> row_pointers(const float* x, int64_t rows, int64_t depth) {
  std::vector<const float*> pointers(rows);
  for (int64_t r = 0; r < rows; ++r) pointers[r] = x + r * depth;
  return pointers;
}

// Products of one depth and number of columns, scheduled together.
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
  Tensor out = new_empty(x, {rows, depth});
  const float* from = elements<float>(x, rows * depth, "x");
  const float* factor = elements<float>(weight, depth, "weight");
  float* to = elements<float>(out, rows * depth, "out");
  row_steps().rms_norm(from, factor, depth, static_cast<float>(eps), 0, rows, to);
  return out;
}

Tensor step_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  Tensor out = new_empty(x, {rows, columns});
  const auto pointers = row_pointers(elements<float>(x, rows * depth, "x"), rows, depth);
  multiply({{pointers.data(), elements<float>(weight, columns * depth, "weight"), rows, depth,
             columns, elements<float>(residual, rows * columns, "residual"),
             elements<float>(out, rows * columns, "out")}});
  return out;
}

void step_route(const Tensor& logits, const std::optional<Tensor>& bias, int64_t real, bool softmax,
                int64_t top_k, int64_t groups, int64_t top_groups, bool normalize, double scale,
                Tensor experts, Tensor weights) {
  const int64_t rows = logits.size(0), count = logits.size(1);
  const auto settings =
      nemocascade::router_settings(count, top_k, groups, top_groups, normalize, scale);
  std::vector<float> scores(rows * count);
  row_steps().scores(elements<float>(logits, rows * count, "logits"), rows, count, softmax,
                     scores.data());
  const float* added = elements<float>(bias, count, "bias");
  int32_t* chosen = elements<int32_t>(experts, rows * top_k, "experts");
  float* weighed = elements<float>(weights, rows * top_k, "weights");
  STD_TORCH_CHECK(real >= 0 && real <= rows, "real is ", real, ", which is not in 0..", rows);
  nemocascade::choose_experts(scores.data(), added, nullptr, nullptr, settings, 0, real, chosen,
                              weighed);
  std::fill(chosen + real * top_k, chosen + rows * top_k, static_cast<int32_t>(count));
  std::fill(weighed + real * top_k, weighed + rows * top_k, 0.0f);
}

Tensor step_experts(const Tensor& x, const Tensor& experts, const Tensor& weights,
                    const Tensor& w_up, const Tensor& w_down, bool swiglu) {
  const int64_t tokens = x.size(0), hidden = x.size(1), top_k = experts.size(1);
  const int64_t count = w_down.size(0), width = w_down.size(2), up = swiglu ? 2 * width : width;
  const int64_t slots = tokens * top_k;
  const float* rows = elements<float>(x, tokens * hidden, "x");
  const int32_t* ids = elements<int32_t>(experts, slots, "experts");
  const float* first = elements<float>(w_up, count * up * hidden, "w_up");
  const float* second = elements<float>(w_down, count * hidden * width, "w_down");
  Tensor out = new_empty(x, {tokens, hidden});
  check_ids(ids, slots, count, "experts");
  std::vector<int32_t> counts(count), order(slots), offsets(count + 1), positions(slots);
  nemocascade::sort_slots(ids, slots, static_cast<int32_t>(count),
                          {counts.data(), order.data(), offsets.data(), positions.data()});

  const int64_t filled = offsets[count];
  std::vector<const float*> sorted(filled);
  for (int64_t i = 0; i < filled; ++i) sorted[i] = rows + order[i] / top_k * hidden;
  std::vector<float> h(filled * up), active(filled * width), y(filled * hidden);
  // The products of every expert that has slots: to[i] = w[expert] x[i] of the sorted slots i.
  const auto products = [&](const std::vector<const float*>& x, const float* w, int64_t depth,
                            int64_t columns, std::vector<float>& to) {
    std::vector<Product> found;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t begin = offsets[e];
      if (counts[e] == 0) continue;
      found.push_back({x.data() + begin, w + e * columns * depth, counts[e], depth, columns,
                       nullptr, to.data() + begin * columns});
    }
    return found;
  };
  multiply(products(sorted, first, hidden, up, h));
  const auto& loops = NEMOCASCADE_BEST_OF(nemocascade, expert_rows);
  const int64_t rows_at_a_time = std::max<int64_t>(1, kWork / (up * 8 + 1));
  torch::stable::parallel_for(0, filled, rows_at_a_time, [&](int64_t begin, int64_t end) {
    loops.activate(h.data() + begin * up, swiglu, end - begin, width,
                   active.data() + begin * width);
  });
  multiply(products(row_pointers(active.data(), filled, width), second, width, hidden, y));
  loops.combine(y.data(), positions.data(), elements<float>(weights, slots, "weights"), filled,
                top_k, hidden, 0, tokens, elements<float>(out, tokens * hidden, "out"));
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
          elements<float>(dt_bias, ssm_state.size(1), "dt_bias"),
          elements<float>(a, ssm_state.size(1), "A"),
          elements<float>(d, ssm_state.size(1), "D"),
          nullptr};
  m.conv_weight = elements<float>(conv_weight, m.channels() * m.width, "conv_weight");
  m.conv_bias = elements<float>(conv_bias, m.channels(), "conv_bias");
  m.norm_weight = elements<float>(norm_weight, m.inner(), "norm_weight");
  const int64_t input = m.inner() + m.channels() + m.heads;
  const int64_t conv_size = (m.width - 1) * m.channels();
  const int64_t ssm_size = m.inner() * m.state;
  const float* from = elements<float>(zxbcdt, rows * input, "zxbcdt");
  float* conv = elements<float>(conv_state, count * conv_size, "conv_state");
  float* ssm = elements<float>(ssm_state, count * ssm_size, "ssm_state");
  const int64_t* at = elements<int64_t>(slots, rows, "slots");
  check_ids(at, rows, count - 1, "slots");
  Tensor out = new_empty(zxbcdt, {rows, m.inner()});
  float* to = elements<float>(out, rows * m.inner(), "out");
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
                      const Tensor& table, const Tensor& slots, const Tensor& positions) {
  using nemocascade::decode_step::Cache;
  const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1);
  const int64_t blocks = keys.size(0), size = keys.size(2), width = size * dim;
  const int64_t count = table.size(0), columns = table.size(1), ratio = heads / kv_heads;
  STD_TORCH_CHECK(size % nemocascade::decode_step::kKeysTogether == 0, "a block of ", size,
                  " tokens is none of a multiple of ", nemocascade::decode_step::kKeysTogether);
  const float* queries = elements<float>(q, rows * heads * dim, "q");
  const float* new_keys = elements<float>(k, rows * kv_heads * dim, "k");
  const float* new_values = elements<float>(v, rows * kv_heads * dim, "v");
  float* all_keys = elements<float>(keys, blocks * kv_heads * width, "keys");
  float* all_values = elements<float>(values, blocks * kv_heads * width, "values");
  const int32_t* all_blocks = elements<int32_t>(table, count * columns, "table");
  const int64_t* at = elements<int64_t>(slots, rows, "slots");
  const int64_t* held = elements<int64_t>(positions, rows, "positions");
  check_ids(at, rows, count - 1, "slots");
  check_ids(held, rows, columns * size - 1, "positions");
  for (int64_t r = 0; r < rows; ++r) {
    check_ids(all_blocks + at[r] * columns, held[r] / size + 1, blocks - 1, "table");
  }
  Tensor out = new_empty(q, {rows, heads, dim});
  float* to = elements<float>(out, rows * heads * dim, "out");
  const int64_t longest = rows == 0 ? 0 : *std::max_element(held, held + rows) + 1;
  const int64_t grain = std::max<int64_t>(1, kWork / (longest * ratio * dim * 2 + 1));
  torch::stable::parallel_for(0, rows * kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(nemocascade::decode_step::kQueriesTogether *
                               (longest + nemocascade::decode_step::kKeysAtATime));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / kv_heads, head = i % kv_heads * width;
      const int32_t* mine = all_blocks + at[r] * columns;
      const int64_t row = mine[held[r] / size] * kv_heads * width + head + held[r] % size * dim;
      std::copy_n(new_keys + i * dim, dim, all_keys + row);
      std::copy_n(new_values + i * dim, dim, all_values + row);
      const Cache cache{all_keys + head, all_values + head, mine, size, kv_heads * width};
      mixers().attention(queries + i * ratio * dim, cache, ratio, dim, held[r] + 1, scratch.data(),
                         to + i * ratio * dim);
    }
  });
  return out;
}

void step_draw(const Tensor& logits, const std::optional<Tensor>& u, double scale, int64_t limit,
               const std::optional<Tensor>& allowed, Tensor tokens, Tensor logprobs) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(limit >= 1 && limit <= vocabulary, "limit is ", limit, ", which is not in 1..",
                  vocabulary);
  const float* from = elements<float>(logits, rows * vocabulary, "logits");
  const double* numbers = elements<double>(u, rows, "u");
  const bool* mask = elements<bool>(allowed, rows * vocabulary, "allowed");
  int64_t* to = elements<int64_t>(tokens, rows, "tokens");
  float* found = elements<float>(logprobs, rows, "logprobs");
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
      "table, Tensor slots, Tensor positions) -> Tensor");
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
