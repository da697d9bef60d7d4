// CUDA on the CPU, for tests: every thread of a block is a fiber, blocks run one after the other.
// It replaces csrc/common/launch.cuh and the CUDA headers. Warp operations wait for all 32 lanes, so
// a kernel in which lanes miss each other hangs the scheduler, which aborts.
//
// Fibers and blocks run in an order that follows from a seed, and some warps rest at random while
// others go ahead. A kernel that lacks a barrier then gives wrong results for some seeds. Tests can
// make the barriers of one source line do nothing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
  unsigned x;
};

struct Warp {
  uint64_t given[32], taken[32];
  int arrived = 0, turn = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Index thread{};
  bool finished = false;
  static constexpr size_t kStack = 64 << 10;
};

inline Index block_index{};
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int at_barrier = 0, barrier_turn = 0, alive = 0;
inline bool moved = false;
alignas(16) inline char shared_memory[kMostShared];
inline std::mt19937 random;
inline int skipped_line = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void finish_barrier() {
  if (alive > 0 && at_barrier == alive) {
    at_barrier = 0;
    ++barrier_turn;
    moved = true;
  }
}

inline void start() {
  body();
  current->finished = moved = true;
  --alive;
  finish_barrier();  // a thread that has left counts as having come
  yield();
}

// Every lane gives 8 bytes and sees those of all lanes.
inline const uint64_t* exchange(uint64_t value) {
  Warp& warp = warps[current->thread.x / 32];
  warp.given[current->thread.x % 32] = value;
  const int turn = warp.turn;
  if (++warp.arrived == 32) {
    std::copy_n(warp.given, 32, warp.taken);
    warp.arrived = 0;
    ++warp.turn;
    moved = true;
  }
  while (warp.turn == turn) yield();
  return warp.taken;
}

template <typename T>
uint64_t pack(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T, typename F>
T reduce(T value, F combine) {
  const uint64_t* all = exchange(pack(value));
  T result = unpack<T>(all[0]);
  for (int lane = 1; lane < 32; ++lane) result = combine(result, unpack<T>(all[lane]));
  return result;
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

inline void run_block(unsigned threads) {
  std::memset(shared_memory, 0xa5, sizeof(shared_memory));
  fibers = std::vector<Fiber>(threads);
  warps.assign((threads + 31) / 32, Warp{});
  alive = static_cast<int>(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread.x = t;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  std::vector<unsigned> order = shuffled(threads);
  while (alive > 0) {
    // All must have had their turn before nothing moving means that nothing can.
    const uint64_t awake = moved ? random() : ~uint64_t{0};
    moved = false;
    if (random() % 4 == 0) order = shuffled(threads);
    for (const unsigned thread : order) {
      Fiber& fiber = fibers[thread];
      if (fiber.finished || (awake >> (thread / 32) & 1) == 0) continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
    if (!moved && awake == ~uint64_t{0}) {
      std::fprintf(stderr, "emulation: threads wait for each other for ever\n");
      std::abort();
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block_index)

using std::max;
using std::min;

inline void sync_warp(int line) {
  if (line != emulation::skipped_line) emulation::exchange(0);
}
inline void sync_threads(int line) {
  if (line == emulation::skipped_line) return;
  const int turn = emulation::barrier_turn;
  ++emulation::at_barrier;
  emulation::finish_barrier();
  while (emulation::barrier_turn == turn) emulation::yield();
}
#define __syncwarp() sync_warp(__LINE__)
#define __syncthreads() sync_threads(__LINE__)
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::unpack<T>(emulation::exchange(emulation::pack(value))[lane % 32]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::unpack<T>(
      emulation::exchange(emulation::pack(value))[(threadIdx.x % 32) ^ step]);
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return emulation::reduce(value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  return emulation::reduce(value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return emulation::reduce(value, [](T a, T b) { return a + b; });
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  unsigned peers = 0;
  for (int lane = 0; lane < 32; ++lane) {
    peers |= (all[lane] == emulation::pack(value) ? 1u : 0u) << lane;
  }
  return peers;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::yield(); }
inline int32_t __ldcg(const int32_t* address) { return *address; }
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }

namespace nemocascade {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
            cudaStream_t, Arguments... arguments) {
  const auto allowed = emulation::allowed_shared.find(reinterpret_cast<const void*>(kernel));
  if (shared > (allowed == emulation::allowed_shared.end() ? emulation::kShared
                                                           : allowed->second)) {
    emulation::record(cudaErrorInvalidValue);
    return;
  }
  emulation::body = [=] { kernel(arguments...); };
  for (const unsigned block : emulation::shuffled(blocks)) {
    emulation::block_index.x = block;
    emulation::run_block(threads);
  }
}

}  // namespace nemocascade
