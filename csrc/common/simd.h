// Vectors of floats in the compiler's own type, as wide as a register of the level of the processor
// that a file is compiled for. CMakeLists.txt sets the level's name and lanes. Code of one level
// must not be linked into another, so no template of the standard library is used here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/rows.h"

#define INLINE inline __attribute__((always_inline))

namespace nemocascade::NEMOCASCADE_LEVEL {

constexpr int64_t kLanes = NEMOCASCADE_LANES;
constexpr int64_t kDoubleLanes = kLanes / 2;
// Rows of matrices are padded to a multiple of this, at every level.
constexpr int64_t kPad = 16;
constexpr float kLowest = -__builtin_inff();
// Independent chains of operations, so that the others hide the latency of one.
constexpr int64_t kUnroll = 4;
constexpr int64_t kStep = kLanes * kUnroll;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef double Doubles __attribute__((vector_size(kDoubleLanes * sizeof(double))));
typedef int64_t Longs __attribute__((vector_size(kDoubleLanes * sizeof(int64_t))));
typedef float FloatHalf __attribute__((vector_size(kDoubleLanes * sizeof(float))));
typedef int32_t IntHalf __attribute__((vector_size(kDoubleLanes * sizeof(int32_t))));
typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

// Denormals are flushed to zero while this object exists. Decays produce many, and x86 processors
// are a hundred times slower on them.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ | 0x8040U);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#endif
};

constexpr int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename To, typename From>
INLINE To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

INLINE Floats fill(float value) { return Floats{} + value; }

// A type with its element's alignment, instead of bytes: bytes may alias everything, so the
// compiler would reload all other values after every store.
template <typename Vector, typename T>
INLINE Vector load_as(const T* from) {
  typedef Vector Unaligned __attribute__((aligned(alignof(T))));
  return *reinterpret_cast<const Unaligned*>(from);
}

INLINE Floats load(const float* from) { return load_as<Floats>(from); }

INLINE Floats load(const Bf16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits_as<Floats>(__builtin_convertvector(bits, Words) << 16);
}

template <typename T, typename Vector>
INLINE void store(T* to, Vector values) {
  typedef Vector Unaligned __attribute__((aligned(alignof(T))));
  *reinterpret_cast<Unaligned*>(to) = values;
}

// Rounds to the nearest, ties to even; a NaN stays NaN.
INLINE void store(Bf16* to, Floats values) {
  const Words bits = bits_as<Words>(values);
  const Words rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const Ints is_nan = values != values;
  const Words kept = is_nan ? (Words{} + 0x7fc0U) : rounded;
  const Halves narrow = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &narrow, sizeof(narrow));
}

INLINE float widen(float value) { return value; }
INLINE float widen(Bf16 value) { return bits_as<float>(static_cast<uint32_t>(value) << 16); }

// Loads the last elements of a row into the first of a vector, with `filler` after them.
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

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE float largest(Floats values) {
  float top = values[0];
  for (int64_t i = 1; i < kLanes; ++i) top = values[i] > top ? values[i] : top;
  return top;
}

template <typename T>
INLINE float row_maximum(const T* row, int64_t size) {
  Floats best[kUnroll];
  for (auto& lane : best) lane = fill(kLowest);
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) best[u] = larger(load(row + j + u * kLanes), best[u]);
  for (; j + kLanes <= size; j += kLanes) best[0] = larger(load(row + j), best[0]);
  if (j < size) best[0] = larger(load_tail(row + j, size - j, kLowest), best[0]);
  for (int64_t u = 1; u < kUnroll; ++u) best[0] = larger(best[0], best[u]);
  return largest(best[0]);
}

INLINE void clear(float* to, int64_t count) {
  std::memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

INLINE void copy(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// Copies `count` elements into a padded row, with zeros after them.
template <typename T>
INLINE void widen_row(const T* from, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, load(from + j));
  for (; j < count; ++j) to[j] = widen(from[j]);
  for (; j % kPad != 0; ++j) to[j] = 0.0f;
}

// Copies the first `count` elements of a padded row.
template <typename T>
INLINE void narrow_row(const float* from, int64_t count, T* to) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, load(from + j));
  if (j == count) return;
  T last[kLanes];
  store(last, load(from + j));
  std::memcpy(to + j, last, static_cast<size_t>(count - j) * sizeof(T));
}

INLINE void read(const Rows& rows, int64_t row, int64_t column, int64_t count, float* to) {
  const int64_t at = row * rows.stride + column;
  if (rows.is_bf16) {
    widen_row(static_cast<const Bf16*>(rows.data) + at, count, to);
  } else {
    widen_row(static_cast<const float*>(rows.data) + at, count, to);
  }
}

INLINE void write(const float* from, int64_t count, const Rows& rows, int64_t row, int64_t column) {
  const int64_t at = row * rows.stride + column;
  if (rows.is_bf16) {
    narrow_row(from, count, static_cast<Bf16*>(rows.data) + at);
  } else {
    narrow_row(from, count, static_cast<float*>(rows.data) + at);
  }
}

INLINE void prefetch(const Rows& rows, int64_t row, int64_t column, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = rows.is_bf16 ? sizeof(Bf16) : sizeof(float);
  const char* from = static_cast<const char*>(rows.data) + (row * rows.stride + column) * size;
  for (int64_t at = 0; at < count * size; at += kLine) __builtin_prefetch(from + at);
}

INLINE float read_one(const Rows& rows, int64_t row, int64_t column) {
  const int64_t at = row * rows.stride + column;
  return rows.is_bf16 ? widen(static_cast<const Bf16*>(rows.data)[at])
                      : static_cast<const float*>(rows.data)[at];
}

INLINE void write_one(float value, const Rows& rows, int64_t row, int64_t column) {
  float last[kLanes] = {value};
  write(last, 1, rows, row, column);
}

// 0, 1, 2, ...
template <typename Vector, int64_t kCount>
INLINE Vector lanes() {
  Vector values = {};
  for (int64_t i = 0; i < kCount; ++i) values[i] = static_cast<int32_t>(i);
  return values;
}

// Sums of 4 lanes each: lanes i, i + 4, i + 8, ...
INLINE Quad fold(Floats v) {
  if constexpr (kLanes == 16) {
    return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7)) +
           (__builtin_shufflevector(v, v, 8 % kLanes, 9 % kLanes, 10 % kLanes, 11 % kLanes) +
            __builtin_shufflevector(v, v, 12 % kLanes, 13 % kLanes, 14 % kLanes, 15 % kLanes));
  } else if constexpr (kLanes == 8) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3);
  }
}

INLINE float sum(Floats values) {
  const Quad q = fold(values);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

// Transposes the vectors.
INLINE void transpose_quads(Quad& a, Quad& b, Quad& c, Quad& d) {
  const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Quad ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Quad cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// The four vectors' sums, with the additions of `sum`.
INLINE Quad sums(Floats first, Floats second, Floats third, Floats fourth) {
#if NEMOCASCADE_LANES == 16
  // All four at a time, instead of a quarter of a register.
  const auto folded = [](Floats a, Floats b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                                   31);
  };
  Floats all = folded(folded(first, second), folded(third, fourth));
  all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12);
#else
  Quad a = fold(first), b = fold(second), c = fold(third), d = fold(fourth);
  transpose_quads(a, b, c, d);
  return (a + b) + (c + d);
#endif
}

// exp(x) to about 2 ulp for x <= 0 or slightly above; 0 below -87, NaN for NaN.
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
  // The integer n is in the low bits of `shifted`; it is shifted to the exponent's bits.
  const Ints power = bits_as<Ints>(shifted) << 23;
  const Floats scaled = bits_as<Floats>(bits_as<Ints>(p) + power);
  const Floats cut = x < -87.0f ? fill(0.0f) : scaled;
  return x != x ? x : cut;
}

// exp(x) for |x| <= 700 to a relative error below 1e-11; NaN for NaN. As above, with degree 9.
INLINE Doubles exponential(Doubles x) {
  constexpr double kLog2E = 1.44269504088896340736;
  constexpr double kLn2High = 6.93147180369123816490e-1;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  const Doubles shifted = x * kLog2E + kRounder;
  const Doubles n = shifted - kRounder;
  const Doubles r = (x - n * kLn2High) - n * kLn2Low;
  Doubles p = r * (1.0 / 362880.0) + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Longs power = bits_as<Longs>(shifted) << 52;
  const Doubles scaled = bits_as<Doubles>(bits_as<Longs>(p) + power);
  return x != x ? x : scaled;
}

// 1 / (1 + exp(-x)), from the exponential of -|x|, which cannot overflow.
INLINE Floats sigmoid(Floats x) {
  const Floats e = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : fill(1.0f)) / (e + 1.0f);
}

INLINE Floats silu(Floats x) { return x * sigmoid(x); }

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|) in [0, 1], and
// log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, by its series: the rest is below 1e-9.
INLINE Floats softplus(Floats x) {
  const Floats e = exponential(x < 0.0f ? x : -x);
  const Floats s = e / (e + 2.0f), q = s * s;
  Floats p = q * (1.0f / 17.0f) + (1.0f / 15.0f);
  p = p * q + (1.0f / 13.0f);
  p = p * q + (1.0f / 11.0f);
  p = p * q + (1.0f / 9.0f);
  p = p * q + (1.0f / 7.0f);
  p = p * q + (1.0f / 5.0f);
  p = p * q + (1.0f / 3.0f);
  p = p * q + 1.0f;
  return (x < 0.0f ? fill(0.0f) : x) + 2.0f * s * p;
}

}  // namespace nemocascade::NEMOCASCADE_LEVEL
