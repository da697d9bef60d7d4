// Launches of the MoE router's CUDA kernels, with raw pointers and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/expert_choice.h"

namespace nemocascade::moe_router {

// Maximum number of experts for a choice and its gradient, and for a sort only: with kMostChoices a
// block counts them in 53 KB of shared memory, which every GPU since Volta allows.
constexpr int kMostExperts = 512;
constexpr int kMostSorted = 1024;
// Maximum choices of a token and groups of experts: a lane of a warp holds one.
constexpr int kMostChoices = 32;
constexpr int kMostGroups = 32;

struct RouteArguments {
  const void* logits;  // [T, E] or null: given experts are only sorted
  bool bfloat16;       // the logits are bfloat16; otherwise float
  bool softmax;
  const float* bias;     // [E] or null
  const uint8_t* mask;   // [T] or null
  const int32_t* given;  // [T, K] or null
  float* weights;        // [T, K]; not written where logits is null
  int32_t* experts;      // [T, K]
  int32_t* loads;        // scratch, route_scratch(...) elements
  int32_t* state;        // route_state(...) zeros, which a launch counts in and leaves as zeros
  int64_t tokens;
  RouterSettings settings;
  Sorted sorted;
};

// Elements of `RouteArguments::loads`.
int64_t route_scratch(int64_t tokens, int32_t experts);

// Elements of `RouteArguments::state`.
int64_t route_state(int32_t experts);

// Enqueues the choice and the sort, one kernel. T * K < 2^31.
cudaError_t launch_route(const RouteArguments& arguments, cudaStream_t stream);

// Enqueues the gradient [T, E] in the logits, of their type.
cudaError_t launch_route_gradient(const float* grad_weights, const void* logits, bool bfloat16,
                                  bool softmax, const int32_t* experts, void* grad_logits,
                                  int64_t tokens, const RouterSettings& settings,
                                  cudaStream_t stream);

}  // namespace nemocascade::moe_router
