// Vectors of floats for CPU loops, and functions on them.
//
// They are the compiler's own (vector_size), 16 floats wide: one AVX-512 register, two of AVX2, or
// whatever the processor has. The compiler makes a version of a function marked FOR_EACH_CPU for
// each level of x86-64 and picks one at load time. All of this is of one source file: the header
// keeps it in an anonymous namespace, so that no version can be taken for another file's.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace nemocascade {
namespace {

// Bits of a bfloat16.
using Bf16 = uint16_t;

constexpr int64_t kLanes = 16;
// Independent chains of operations, so that the latency of one hides behind the others.
constexpr int64_t kUnroll = 4;
constexpr int64_t kStep = kLanes * kUnroll;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

INLINE Floats fill(float value) { return Floats{} + value; }

INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

INLINE Floats load(const Bf16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return std::bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

// Rounds to the nearest, ties to even; a NaN stays one.
INLINE void store(Bf16* to, Floats values) {
  const Words bits = std::bit_cast<Words>(values);
  const Words rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const Ints is_nan = values != values;
  const Words kept = is_nan ? (Words{} + 0x7fc0U) : rounded;
  const Halves narrow = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &narrow, sizeof(narrow));
}

INLINE float widen(float value) { return value; }
INLINE float widen(Bf16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

// exp(x) to about 2 units in the last place for x <= 0 or not far above; 0 below -87, NaN for NaN.
// 2^t = 2^n 2^f with n the nearest integer to t; 2^f on [-1/2, 1/2] by its Taylor polynomial of
// degree 7, whose error there is below 1e-8.
INLINE Floats exponential(Floats x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats bounded = x < -87.0f ? fill(-87.0f) : x;
  const Floats shifted = bounded * kLog2E + kRounder;
  const Floats n = shifted - kRounder;
  const Floats r = (bounded - n * kLn2High) - n * kLn2Low;
  Floats p = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  p = p * r + (1.0f / 120.0f);
  p = p * r + (1.0f / 24.0f);
  p = p * r + (1.0f / 6.0f);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The integer n stands in the low bits of `shifted`; it moves to the exponent's place.
  const Ints power = std::bit_cast<Ints>(shifted) << 23;
  const Floats scaled = std::bit_cast<Floats>(std::bit_cast<Ints>(p) + power);
  const Floats cut = x < -87.0f ? fill(0.0f) : scaled;
  return x != x ? x : cut;
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float sum(Floats values) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) total += values[i];
  return total;
}

// The last elements of a row, widened, with `filler` after them.
template <typename T>
INLINE Floats load_tail(const T* from, int64_t count, float filler) {
  Floats values = fill(filler);
  for (int64_t i = 0; i < count; ++i) values[i] = widen(from[i]);
  return values;
}

template <typename T>
INLINE void store_tail(T* to, int64_t count, Floats values) {
  T whole[kLanes];
  store(whole, values);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
INLINE float row_maximum(const T* row, int64_t size) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Floats best[kUnroll];
  for (auto& lane : best) lane = fill(kLowest);
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) best[u] = larger(load(row + j + u * kLanes), best[u]);
  for (; j + kLanes <= size; j += kLanes) best[0] = larger(load(row + j), best[0]);
  if (j < size) best[0] = larger(load_tail(row + j, size - j, kLowest), best[0]);
  for (int64_t u = 1; u < kUnroll; ++u) best[0] = larger(best[0], best[u]);
  float top = kLowest;
  for (int64_t i = 0; i < kLanes; ++i) top = best[0][i] > top ? best[0][i] : top;
  return top;
}

}  // namespace
}  // namespace nemocascade
