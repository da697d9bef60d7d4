// The MoE router on a GPU: device code, free of torch. One warp chooses for one token.
//
// The slots are sorted by expert in the same launch, without a host synchronisation. Blocks draw a
// number when they start, and do one of three jobs by it. The first choose, and rank each slot
// among the earlier slots of its expert in the same block; the next turn every choosing block's
// loads into the first positions of its slots of each expert; the last add the two. A block waits
// only for blocks of lower numbers, which run already, so there is no deadlock. The sort is stable
// because blocks hold consecutive tokens and ranks count in their order.
#pragma once

#include <cstdint>

#include "common/expert_choice.h"
#include "common/launch.cuh"

namespace nemocascade::moe_router {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr unsigned kAll = 0xffffffffu;
// Tokens of one iteration of choose_tokens' loop.
constexpr int kTileTokens = 64;
// Maximum blocks that choose: scan_loads reads a row of loads for each.
constexpr int kMostBlocks = 512;
// scan_loads: experts of a block, and parts into which it splits the rows of loads.
constexpr int kScanExperts = 32;
constexpr int kScanParts = kWarps;
// Slots of a block that places.
constexpr int kPlaced = 4 * kThreads;
// Counters before the slots of each expert in the state of a launch.
constexpr int kCounters = 4;
enum Counter { kDrawn, kChosen, kScanned, kEnded };
// Elements of a lane up to which a choice compares all of them again.
constexpr int kMostRepeated = 4;
// A bfloat16 as its bits.
struct Bf16 {
  uint16_t bits;
};

struct RouteKernelArguments {
  const void* logits;    // [T, E] float or Bf16; null: given experts are only sorted
  const float* bias;     // [E] or null
  const uint8_t* mask;   // [T] or null: 0 for a token without experts
  const int32_t* given;  // [T, K] or null: these experts instead of a choice
  float* weights;        // [T, K]; not written where logits is null
  int32_t* experts;      // [T, K]
  int32_t* positions;    // [T, K]; ranks until they are placed
  int32_t* loads;        // [choosers, E + 1]
  int32_t* state;        // [kCounters + E], zeros before and after
  int32_t* counts;       // [E]
  int32_t* offsets;      // [E + 1]
  int32_t* order;        // [T * K]
  int64_t tokens;
  int32_t tokens_of_block;  // a multiple of kTileTokens
  int32_t choosers, scanners, blocks;
  RouterSettings settings;
};

struct GradientArguments {
  const float* grad_weights;  // [T, K]
  const void* logits;         // [T, E]
  const int32_t* experts;     // [T, K]
  void* grad_logits;          // [T, E], of the logits' type
  int64_t tokens;
  RouterSettings settings;
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Bf16 value) {
  return __int_as_float(static_cast<int32_t>(static_cast<uint32_t>(value.bits) << 16));
}

__device__ inline void narrow(float value, float* out) { *out = value; }
// Rounds to the nearest, ties to even; a NaN stays NaN.
__device__ inline void narrow(float value, Bf16* out) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Maps floats to unsigned integers of the same order, all above 0; a NaN is above all, -0 equals 0.
__device__ inline uint32_t ordered(float value) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(value + 0.0f));
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return value != value ? 0xffffffffu : key;
}

// The float of a key. The key of NaN gives a NaN.
__device__ inline float unordered(uint32_t key) {
  return __int_as_float(static_cast<int32_t>(key >> 31 ? key & 0x7fffffffu : ~key));
}

__device__ inline float warp_sum(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
  }
  return value;
}

// A row spread over a warp: lane l holds the elements l, l + 32, ...
template <typename T, int kItems>
struct Row {
  T items[kItems];

  // Element `at`, which must be the same in every lane. (Comparing with the lane in the loop keeps
  // the compiler from making an indexed array of the registers.)
  __device__ T pick(int at, int lane) const {
    T value{};
#pragma unroll
    for (int i = 0; i < kItems; ++i) value = i * kLanes + lane == at ? items[i] : value;
    return __shfl_sync(kAll, value, at % kLanes);
  }
};

template <int kItems>
using Keys = Row<uint32_t, kItems>;

// Removes the largest key and returns its id; among equal keys, the lowest. Keys of 0 are excluded.
template <int kItems>
__device__ int take_largest(Keys<kItems>& keys, int lane, uint32_t* key = nullptr) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) largest = max(largest, keys.items[i]);
  largest = __reduce_max_sync(kAll, largest);
  uint32_t id = 0xffffffffu;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    id = keys.items[i] == largest ? static_cast<uint32_t>(i * kLanes + lane) : id;
  }
  id = __reduce_min_sync(kAll, id);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (id == static_cast<uint32_t>(i * kLanes + lane)) keys.items[i] = 0;
  }
  if (key != nullptr) *key = largest;
  return static_cast<int>(id);
}

// Shared memory of a warp for choose_by_spans, in words: one more a lane keeps lanes in other
// banks.
__host__ __device__ constexpr int span_words(int items) {
  return items > kMostRepeated ? kLanes * (items + 1) : 0;
}

// Lane k returns choice k of the keys; `experts` in the lanes beyond.
//
// A lane's elements are a span, whose best key it keeps. A choice is the best of all spans, and
// only its span is read again, by one lane for each element: so a choice takes a few reductions,
// whatever the number of experts. `keys_of_spans` is the warp's shared memory.
template <int kItems>
__device__ int choose_by_spans(const Keys<kItems>& keys, uint32_t* keys_of_spans, int top_k,
                               int experts, int lane) {
  static_assert(kItems <= kLanes);
  constexpr uint32_t kNone = 0xffffffffu;
  constexpr int kStride = kItems + 1;
  uint32_t best = 0, best_id = kNone;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    keys_of_spans[lane * kStride + i] = keys.items[i];
    best_id = keys.items[i] > best ? static_cast<uint32_t>(i * kLanes + lane) : best_id;
    best = max(best, keys.items[i]);
  }
  __syncwarp();
  int mine = experts;
  for (int k = 0; k < top_k; ++k) {
    const uint32_t largest = __reduce_max_sync(kAll, best);
    const uint32_t id = __reduce_min_sync(kAll, best == largest ? best_id : kNone);
    if (lane == k) mine = static_cast<int>(id);
    const int span = static_cast<int>(id % kLanes);
    uint32_t left = 0;
    if (lane < kItems) {
      // Element `lane` of a span is only read and written by this lane from here on.
      uint32_t* own = keys_of_spans + span * kStride + lane;
      left = lane == static_cast<int>(id / kLanes) ? 0 : *own;
      *own = left;
    }
    const uint32_t next = __reduce_max_sync(kAll, left);
    const uint32_t next_id =
        __reduce_min_sync(kAll, left == next ? static_cast<uint32_t>(lane * kLanes + span) : kNone);
    if (lane == span) {
      best = next;
      best_id = next_id;
    }
  }
  // The next token's keys overwrite these.
  __syncwarp();
  return mine;
}

// Scores of a token: sigmoid or softmax of its logits; 0 past the last expert.
template <typename Scalar, int kItems, bool kSoftmax>
__device__ Row<float, kItems> scores_of(const Scalar* logits, int experts, int lane) {
  Row<float, kItems> row;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = i * kLanes + lane;
    row.items[i] = e < experts ? widen(logits[e]) : -INFINITY;
  }
  if constexpr (kSoftmax) {
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) top = fmaxf(top, row.items[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      row.items[i] = i * kLanes + lane < experts ? expf(row.items[i] - top) : 0.0f;
      sum += row.items[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.items[i] /= sum;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) row.items[i] = 1.0f / (1.0f + expf(-row.items[i]));
  }
  return row;
}

// Excludes the experts outside the token's best groups.
template <int kItems>
__device__ void keep_best_groups(Keys<kItems>& keys, const RouterSettings& settings, int lane) {
  const int size = settings.experts / settings.groups;
  Keys<1> group_keys{{0}};
  for (int g = 0; g < settings.groups; ++g) {
    Keys<kItems> own;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      own.items[i] = (i * kLanes + lane) / size == g ? keys.items[i] : 0;
    }
    uint32_t first, second;
    take_largest(own, lane, &first);
    float score = unordered(first);
    if (size >= kScoresPerGroup) {
      take_largest(own, lane, &second);
      score += unordered(second);
    }
    if (lane == g) group_keys.items[0] = ordered(score);
  }
  uint32_t kept = 0;
  for (int g = 0; g < settings.top_groups; ++g) kept |= 1u << take_largest(group_keys, lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = i * kLanes + lane;
    if (e < settings.experts && (kept >> (e / size) & 1u) == 0) keys.items[i] = 0;
  }
}

// Lane k returns choice k of a token that is not masked; E in the other lanes.
template <int kItems>
__device__ int choose(const Row<float, kItems>& scores, const RouteKernelArguments& arguments,
                      uint32_t* keys_of_spans, int lane) {
  const RouterSettings& settings = arguments.settings;
  Keys<kItems> keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = i * kLanes + lane;
    const bool is_expert = e < settings.experts;
    const float bias = is_expert && arguments.bias != nullptr ? arguments.bias[e] : 0.0f;
    keys.items[i] = is_expert ? ordered(scores.items[i] + bias) : 0;
  }
  if (settings.groups > 1) keep_best_groups(keys, settings, lane);
  if constexpr (kItems > kMostRepeated) {
    return choose_by_spans(keys, keys_of_spans, settings.top_k, settings.experts, lane);
  }
  int mine = settings.experts;
  for (int k = 0; k < settings.top_k; ++k) {
    const int id = take_largest(keys, lane);
    if (lane == k) mine = id;
  }
  return mine;
}

// Chooses for one token; lane k < K returns choice k and writes it and its weight.
template <typename Scalar, int kItems, bool kSoftmax>
__device__ int route_token(const RouteKernelArguments& arguments, uint32_t* keys_of_spans,
                           int64_t token, int lane) {
  const RouterSettings& settings = arguments.settings;
  const int64_t slot = token * settings.top_k + lane;
  const bool is_choice = lane < settings.top_k;
  const bool masked = arguments.mask != nullptr && arguments.mask[token] == 0;
  int mine = settings.experts;
  if (arguments.given != nullptr && is_choice && !masked) {
    // A kernel cannot raise: an id out of range means no expert.
    const int id = arguments.given[slot];
    mine = id < 0 || id > settings.experts ? settings.experts : id;
  }
  if (arguments.logits != nullptr) {
    float score = 0.0f;
    if (!masked) {
      const Scalar* row = static_cast<const Scalar*>(arguments.logits) + token * settings.experts;
      const auto scores = scores_of<Scalar, kItems, kSoftmax>(row, settings.experts, lane);
      if (arguments.given == nullptr) mine = choose(scores, arguments, keys_of_spans, lane);
      if constexpr (kSoftmax) {
        for (int k = 0; k < settings.top_k; ++k) {
          const int id = __shfl_sync(kAll, mine, k);
          const float picked = id < settings.experts ? scores.pick(id, lane) : 0.0f;
          if (lane == k) score = picked;
        }
      } else if (mine < settings.experts) {
        score = 1.0f / (1.0f + expf(-widen(row[mine])));
      }
    }
    if (settings.normalize) score /= warp_sum(score) + kNormalizeEpsilon;
    if (is_choice) arguments.weights[slot] = score * settings.scale;
  }
  if (is_choice) arguments.experts[slot] = mine;
  return mine;
}

// Shared memory of route_kernel, in int32: ids and ranks of a tile, loads of each warp, loads of
// earlier tiles, keys of each warp. items: elements of a lane; 0 if given experts are only sorted.
__host__ __device__ inline int choose_shared(const RouterSettings& settings, int items) {
  return 2 * kTileTokens * settings.top_k + (kWarps + 1) * (settings.experts + 1) +
         kWarps * span_words(items);
}

// Ranks the tile's slots among those of their expert: within the warp's segment of slots, then
// over the warps, then over the block's earlier tiles.
__device__ inline void rank_tile(const int32_t* ids, int32_t* ranks, int32_t* warp_loads,
                                 int32_t* seen, int slots, int experts, int32_t* out) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int segment = (slots + kThreads - 1) / kThreads * kLanes;
  const int begin = warp * segment;
  int32_t* own = warp_loads + warp * (experts + 1);
  for (int e = lane; e <= experts; e += kLanes) own[e] = 0;
  __syncwarp();
  for (int slot = begin + lane; slot < begin + segment; slot += kLanes) {
    const int id = slot < slots ? ids[slot] : -1;
    const unsigned peers = __match_any_sync(kAll, id);
    const unsigned before = peers & ((1u << lane) - 1);
    if (id >= 0) ranks[slot] = own[id] + __popc(before);
    __syncwarp();
    if (id >= 0 && before == 0) own[id] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += kThreads) {
    int32_t total = seen[e];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t load = warp_loads[w * (experts + 1) + e];
      warp_loads[w * (experts + 1) + e] = total;
      total += load;
    }
    seen[e] = total;
  }
  __syncthreads();
  for (int slot = begin + lane; slot < begin + segment && slot < slots; slot += kLanes) {
    out[slot] = ranks[slot] + own[ids[slot]];
  }
  __syncthreads();
}

// Chooses for the tokens of one block, ranks their slots, and leaves the load of each expert.
template <typename Scalar, int kItems, bool kSoftmax>
__device__ void choose_tokens(const RouteKernelArguments& arguments, int number) {
  const int experts = arguments.settings.experts, top_k = arguments.settings.top_k;
  int32_t* ids = dynamic_shared<int32_t>();
  int32_t* ranks = ids + kTileTokens * top_k;
  int32_t* warp_loads = ranks + kTileTokens * top_k;
  int32_t* seen = warp_loads + kWarps * (experts + 1);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint32_t* keys_of_spans =
      reinterpret_cast<uint32_t*>(seen + experts + 1) + warp * span_words(kItems);
  for (int e = threadIdx.x; e <= experts; e += kThreads) seen[e] = 0;

  const int64_t first = static_cast<int64_t>(number) * arguments.tokens_of_block;
  const int64_t last = min(first + arguments.tokens_of_block, arguments.tokens);
  for (int64_t tile = first; tile < last; tile += kTileTokens) {
    const int tokens = static_cast<int>(min(last - tile, static_cast<int64_t>(kTileTokens)));
    for (int t = warp; t < tokens; t += kWarps) {
      const int mine =
          route_token<Scalar, kItems, kSoftmax>(arguments, keys_of_spans, tile + t, lane);
      if (lane < top_k) ids[t * top_k + lane] = mine;
    }
    __syncthreads();
    rank_tile(ids, ranks, warp_loads, seen, tokens * top_k, experts,
              arguments.positions + tile * top_k);
  }
  // No barrier: only thread e % kThreads reads and writes seen[e].
  int32_t* loads = arguments.loads + static_cast<int64_t>(number) * (experts + 1);
  for (int e = threadIdx.x; e <= experts; e += kThreads) {
    loads[e] = seen[e];
    if (e < experts && seen[e] != 0) atomicAdd(arguments.state + kCounters + e, seen[e]);
  }
}

// Part p has the experts from p * kScanExperts on, including E for slots without one. Their loads
// become the slots' first positions.
__device__ inline void scan_loads(const RouteKernelArguments& arguments, int part_of_experts) {
  __shared__ int32_t begins[kScanExperts];
  __shared__ int32_t totals[kScanParts][kScanExperts];
  const int lane = threadIdx.x % kScanExperts, part = threadIdx.x / kScanExperts;
  const int experts = arguments.settings.experts, rows = arguments.choosers;
  const int expert = part_of_experts * kScanExperts + lane;
  const bool is_expert = expert <= experts;
  const int32_t* sums = arguments.state + kCounters;

  // A warp sums the slots before one expert after the other.
  for (int i = part; i < kScanExperts; i += kScanParts) {
    const int summed = part_of_experts * kScanExperts + i;
    int32_t before = 0;
    for (int e = lane; e < summed && e < experts; e += kLanes) before += __ldcg(sums + e);
    before = __reduce_add_sync(kAll, before);
    if (lane == 0) begins[i] = before;
  }
  const int segment = (rows + kScanParts - 1) / kScanParts;
  const int first = part * segment, last = min(first + segment, rows);
  const int64_t width = experts + 1;
  int32_t* loads = arguments.loads;
  int32_t total = 0;
  for (int row = first; is_expert && row < last; ++row)
    total += __ldcg(loads + row * width + expert);
  totals[part][lane] = total;
  __syncthreads();
  if (!is_expert) return;
  int32_t next = begins[lane];
  if (part == 0) {
    arguments.offsets[expert] = next;
    if (expert < experts) arguments.counts[expert] = __ldcg(sums + expert);
  }
  for (int p = 0; p < part; ++p) next += totals[p][lane];
  for (int row = first; row < last; ++row) {
    const int32_t load = __ldcg(loads + row * width + expert);
    loads[row * width + expert] = next;
    next += load;
  }
}

// position = first position of its choosing block's slots of the expert + its rank.
__device__ inline void place_slots(const RouteKernelArguments& arguments, int part) {
  const int64_t slots = arguments.tokens * arguments.settings.top_k;
  const int64_t slots_of_row =
      static_cast<int64_t>(arguments.tokens_of_block) * arguments.settings.top_k;
  const int64_t first = static_cast<int64_t>(part) * kPlaced + threadIdx.x;
  for (int64_t slot = first; slot < first - threadIdx.x + kPlaced && slot < slots;
       slot += kThreads) {
    const int64_t row = slot / slots_of_row * (arguments.settings.experts + 1);
    const int32_t begin = __ldcg(arguments.loads + row + __ldcg(arguments.experts + slot));
    const int32_t position = begin + __ldcg(arguments.positions + slot);
    arguments.positions[slot] = position;
    arguments.order[position] = static_cast<int32_t>(slot);
  }
}

// Counts this block, after all that it has written; thread 0 returns those counted before.
__device__ inline int finish(int32_t* counter) {
  __syncthreads();
  if (threadIdx.x != 0) return -1;
  __threadfence();
  return atomicAdd(counter, 1);
}

// Waits until so many blocks have finished, and sees what they have written.
__device__ inline void wait_for(int32_t* counter, int blocks) {
  if (threadIdx.x == 0) {
    while (atomicAdd(counter, 0) < blocks) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
}

// Blocks of kThreads threads.
template <typename Scalar, int kItems, bool kSoftmax>
__global__ void __launch_bounds__(kThreads) route_kernel(RouteKernelArguments arguments) {
  __shared__ int drawn;
  int32_t* state = arguments.state;
  if (threadIdx.x == 0) drawn = atomicAdd(state + kDrawn, 1);
  __syncthreads();
  const int number = drawn, choosers = arguments.choosers, scanners = arguments.scanners;
  if (number < choosers) {
    choose_tokens<Scalar, kItems, kSoftmax>(arguments, number);
    finish(state + kChosen);
  } else if (number < choosers + scanners) {
    wait_for(state + kChosen, choosers);
    scan_loads(arguments, number - choosers);
    finish(state + kScanned);
  } else {
    wait_for(state + kScanned, scanners);
    place_slots(arguments, number - choosers - scanners);
  }
  // The last block leaves zeros for the next launch.
  if (finish(state + kEnded) == arguments.blocks - 1) {
    for (int i = 0; i < kCounters + arguments.settings.experts; ++i) state[i] = 0;
  }
}

// One warp a token. weights = scale * s / S with S = sum s + epsilon, so the gradient in s_k is
// (g_k - sum_j g_j s_j / S) / S.
template <typename Scalar, int kItems, bool kSoftmax>
__global__ void __launch_bounds__(kThreads) gradient_kernel(GradientArguments arguments) {
  const RouterSettings& settings = arguments.settings;
  const int lane = threadIdx.x % kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (token >= arguments.tokens) return;
  const Scalar* logits = static_cast<const Scalar*>(arguments.logits) + token * settings.experts;
  Scalar* out = static_cast<Scalar*>(arguments.grad_logits) + token * settings.experts;
  const int64_t slot = token * settings.top_k + lane;
  const int mine = lane < settings.top_k ? arguments.experts[slot] : settings.experts;
  const bool present = mine < settings.experts;
  Row<float, kItems> grads{};
  // The logits of a token without experts are not read: they may be NaN.
  if (__reduce_max_sync(kAll, present ? 1u : 0u) != 0) {
    Row<float, kItems> scores{};
    float score = 0.0f;
    if constexpr (kSoftmax) {
      scores = scores_of<Scalar, kItems, true>(logits, settings.experts, lane);
      for (int k = 0; k < settings.top_k; ++k) {
        const int id = __shfl_sync(kAll, mine, k);
        const float picked = id < settings.experts ? scores.pick(id, lane) : 0.0f;
        if (lane == k) score = picked;
      }
    } else if (present) {
      score = 1.0f / (1.0f + expf(-widen(logits[mine])));
    }
    float slope = present ? arguments.grad_weights[slot] * settings.scale : 0.0f;
    if (settings.normalize) {
      const float sum = warp_sum(score) + kNormalizeEpsilon;
      slope = (slope - warp_sum(slope * score) / sum) / sum;
    }
    slope = present ? slope * score : 0.0f;
    if constexpr (kSoftmax) {
      const float inner = warp_sum(slope);
#pragma unroll
      for (int i = 0; i < kItems; ++i) grads.items[i] = -scores.items[i] * inner;
    } else {
      slope *= 1.0f - score;
    }
    for (int k = 0; k < settings.top_k; ++k) {
      const int id = __shfl_sync(kAll, mine, k);
      const float own = __shfl_sync(kAll, slope, k);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (id == i * kLanes + lane) grads.items[i] += own;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = i * kLanes + lane;
    if (e < settings.experts) narrow(grads.items[i], out + e);
  }
}

}  // namespace nemocascade::moe_router
