#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>

#include "common/blas.h"
#include "common/tensor.h"
#include "moe_experts/experts.h"

namespace {

using nemocascade::elements;
using nemocascade::moe_experts::Experts;
using nemocascade::moe_experts::Segment;
using nemocascade::moe_experts::Task;
using torch::stable::Tensor;

// Minimum rows of a backward's window, in total and for each thread, so that all are busy.
constexpr int64_t kWindowRows = 2048, kWindowRowsPerThread = 512;

// The BLAS that torch was built with must be callable.
void check_product() {
  STD_TORCH_CHECK(nemocascade::blas::has_float_product(), "this torch exports no sgemm_");
}

// Every thread takes the next task when it has finished one. Products inside must run on one thread
// each, as BLAS does within a parallel region: so there is one even for few tasks.
void run(int64_t count, int64_t scratch_floats, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
          const auto scratch = std::make_unique_for_overwrite<float[]>(scratch_floats);
          for (int64_t i = next++; i < count; i = next++) task(i, scratch.get());
        }
      });
}

// Checks and converts the arguments: segments [P, 4] int64 must cover consecutive slots.
Experts experts_of(int64_t hidden, const Tensor& order, const Tensor& positions,
                   const Tensor& weights, const Tensor& w_up, const Tensor& w_down,
                   const Tensor& segments, bool swiglu) {
  check_product();
  const int64_t count = w_down.size(0), width = w_down.size(2), tokens = weights.size(0);
  const int64_t top_k = weights.size(1), slots = tokens * top_k;
  const Experts experts{tokens,
                        top_k,
                        hidden,
                        width,
                        swiglu,
                        elements<float>(w_up, count * width * (swiglu ? 2 : 1) * hidden, "w_up"),
                        elements<float>(w_down, count * hidden * width, "w_down"),
                        elements<float>(weights, slots, "weights"),
                        elements<int32_t>(order, slots, "order"),
                        elements<int32_t>(positions, slots, "positions"),
                        reinterpret_cast<const Segment*>(
                            elements<int64_t>(segments, segments.size(0) * 4, "segments")),
                        segments.size(0)};
  int64_t next = 0;
  for (int64_t i = 0; i < experts.num_segments; ++i) {
    const Segment& segment = experts.segments[i];
    STD_TORCH_CHECK(segment.expert >= 0 && segment.expert < count && segment.first == next &&
                        segment.count > 0 && segment.count <= segment.size,
                    "segment ", i, " does not follow the one before");
    const bool last =
        i + 1 == experts.num_segments || experts.segments[i + 1].expert != segment.expert;
    STD_TORCH_CHECK(last || segment.count == segment.size, "segment ", i, " must be full");
    next += segment.count;
  }
  STD_TORCH_CHECK(next <= slots, "segments hold ", next, " of ", slots, " slots");
  for (int64_t i = 0; i < slots; ++i) {
    STD_TORCH_CHECK(experts.order[i] >= 0 && experts.order[i] < slots, "order holds ",
                    experts.order[i], ", which is no slot");
  }
  return experts;
}

void moe_experts_forward(const Tensor& x, const Tensor& order, const Tensor& positions,
                         const Tensor& weights, const Tensor& w_up, const Tensor& w_down,
                         const Tensor& segments, bool swiglu, std::optional<Tensor> h, Tensor rows,
                         Tensor y) {
  const int64_t hidden = x.size(1);
  const Experts experts =
      experts_of(hidden, order, positions, weights, w_up, w_down, segments, swiglu);
  const int64_t slots = experts.tokens * experts.top_k;
  nemocascade::moe_experts::forward(experts, elements<float>(x, experts.tokens * hidden, "x"),
                                    elements<float>(h, experts.filled() * experts.up(), "h"),
                                    elements<float>(rows, slots * hidden, "rows"),
                                    elements<float>(y, experts.tokens * hidden, "y"), run);
}

void moe_experts_backward(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& order,
                          const Tensor& positions, const Tensor& weights, const Tensor& w_up,
                          const Tensor& w_down, const Tensor& segments, bool swiglu,
                          std::optional<Tensor> rows, std::optional<Tensor> grad_x,
                          std::optional<Tensor> grad_weights, std::optional<Tensor> grad_up,
                          std::optional<Tensor> grad_down) {
  const int64_t hidden = x.size(1), threads = torch::stable::get_num_threads();
  const Experts experts =
      experts_of(hidden, order, positions, weights, w_up, w_down, segments, swiglu);
  const int64_t slots = experts.tokens * experts.top_k;
  STD_TORCH_CHECK(rows.has_value() == grad_x.has_value(), "rows are scratch for grad_x");
  nemocascade::moe_experts::backward(
      experts, elements<float>(grad, experts.tokens * hidden, "grad"),
      elements<float>(x, experts.tokens * hidden, "x"),
      elements<float>(h, experts.filled() * experts.up(), "h"),
      {elements<float>(rows, slots * hidden, "rows"),
       elements<float>(grad_x, experts.tokens * hidden, "grad_x"),
       elements<float>(grad_weights, slots, "grad_weights"),
       elements<float>(grad_up, w_up.numel(), "grad_up"),
       elements<float>(grad_down, w_down.numel(), "grad_down")},
      std::max(kWindowRows, kWindowRowsPerThread * threads), threads, run);
}

bool moe_experts_has_product() { return nemocascade::blas::has_float_product(); }

// The product of the experts' segments on its own: out = x @ weight, or x @ weight.T.
void moe_experts_product(const Tensor& x, const Tensor& weight, bool transposed, Tensor out) {
  check_product();
  const int64_t rows = x.size(0), k = x.size(1), n = weight.size(transposed ? 0 : 1);
  const float *from = elements<float>(x, rows * k, "x"),
              *factor = elements<float>(weight, k * n, "weight");
  float* to = elements<float>(out, rows * n, "out");
  run(1, 0, [&](int64_t, float*) {
    nemocascade::blas::multiply(from, factor, transposed, rows, k, n, to);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nemocascade_kernels, m) {
  m.def(
      "moe_experts_forward(Tensor x, Tensor order, Tensor positions, Tensor weights, Tensor w_up, "
      "Tensor w_down, Tensor segments, bool swiglu, Tensor(a!)? h, Tensor(b!) rows, Tensor(c!) y) "
      "-> ()");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor x, Tensor h, Tensor order, Tensor positions, "
      "Tensor weights, Tensor w_up, Tensor w_down, Tensor segments, bool swiglu, Tensor(a!)? rows, "
      "Tensor(b!)? grad_x, Tensor(c!)? grad_weights, Tensor(d!)? grad_up, Tensor(e!)? grad_down) "
      "-> ()");
  m.def("moe_experts_has_product() -> bool");
  m.def("moe_experts_product(Tensor x, Tensor weight, bool transposed, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CompositeExplicitAutograd, m) {
  m.impl("moe_experts_has_product", TORCH_BOX(&moe_experts_has_product));
}

STABLE_TORCH_LIBRARY_IMPL(nemocascade_kernels, CPU, m) {
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
  m.impl("moe_experts_product", TORCH_BOX(&moe_experts_product));
}
