#include "linear_distill_loss/divergence.h"

#include <cmath>
#include <cstring>

#include "common/buffer.h"
#include "common/simd.h"

namespace nemocascade::linear_distill_loss::NEMOCASCADE_LEVEL {

using namespace nemocascade::NEMOCASCADE_LEVEL;

namespace {

// Logit after a row's end: its exponential is 0, and the difference of two of them is finite.
constexpr float kAbsent = -1e30f;
constexpr float kLn2 = 0.693147180559945309f;

// One row: x = scale * logit - maximum, e = exp(x), of the student (a) and of the teacher (b).
template <typename T>
struct Pair {
  T* student;
  const T* teacher;
  int64_t size;
  float scale, top_a, top_b;
};

// Calls visit(a, b, at, chain) on whole vectors of the row; `chain` counts independent sums.
template <typename T, typename Visit>
INLINE void for_each_vector(const Pair<T>& row, Visit visit) {
  const auto both = [&](Floats a, Floats b, int64_t at, int64_t chain)
                        __attribute__((always_inline)) {
                          visit(a * row.scale - row.top_a, b * row.scale - row.top_b, at, chain);
                        };
  int64_t j = 0;
  for (; j + kStep <= row.size; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kLanes;
      both(load(row.student + at), load(row.teacher + at), at, u);
    }
  for (; j + kLanes <= row.size; j += kLanes)
    both(load(row.student + j), load(row.teacher + j), j, 0);
  if (j < row.size)
    both(load_tail(row.student + j, row.size - j, kAbsent),
         load_tail(row.teacher + j, row.size - j, kAbsent), j, 0);
}

INLINE float total(Floats (&chains)[kUnroll]) {
  for (int64_t u = 1; u < kUnroll; ++u) chains[0] += chains[u];
  return sum(chains[0]);
}

template <typename T>
INLINE void write_row(const Pair<T>& row, int64_t at, Floats values) {
  if (at + kLanes <= row.size) {
    store(row.student + at, values);
  } else {
    store_tail(row.student + at, row.size - at, values);
  }
}

struct Sums {
  float student, teacher, cross;
};

// Sums of exp(a) and exp(b), which are kept, and of exp(a) (a - b), or of exp(b) (b - a).
template <Kind kKind, typename T>
INLINE Sums exponentials(const Pair<T>& row, float* kept_a, float* kept_b) {
  Floats student[kUnroll] = {}, teacher[kUnroll] = {}, cross[kUnroll] = {};
  for_each_vector(row,
                  [&](Floats a, Floats b, int64_t at, int64_t u) __attribute__((always_inline)) {
                    const Floats e = exponential(a), f = exponential(b);
                    student[u] += e;
                    teacher[u] += f;
                    if constexpr (kKind == Kind::kReverseKl) cross[u] += e * (a - b);
                    if constexpr (kKind == Kind::kForwardKl) cross[u] += f * (b - a);
                    store(kept_a + at, e);
                    if constexpr (kKind != Kind::kReverseKl) store(kept_b + at, f);
                  });
  return {total(student), total(teacher), total(cross)};
}

// The divergence; with kGradient the student's logits become factor times its gradient.
// log p - log q = a - b + shift.
template <Kind kKind, bool kGradient, typename T>
INLINE float finish(const Pair<T>& row, const Sums& sums, float* kept_a, float* kept_b,
                    float factor) {
  const float shift = std::log(sums.teacher) - std::log(sums.student);
  const float one_p = 1.0f / sums.student, one_q = 1.0f / sums.teacher;
  if constexpr (kKind == Kind::kReverseKl) {
    const float mean = sums.cross * one_p, divergence = mean + shift;
    if constexpr (kGradient)
      for_each_vector(row,
                      [&](Floats a, Floats b, int64_t at, int64_t) __attribute__((always_inline)) {
                        write_row(row, at, load(kept_a + at) * (a - b - mean) * (factor * one_p));
                      });
    return divergence;
  } else if constexpr (kKind == Kind::kForwardKl) {
    if constexpr (kGradient)
      for_each_vector(row, [&](Floats, Floats, int64_t at, int64_t) __attribute__((always_inline)) {
        write_row(row, at,
                  load(kept_a + at) * (factor * one_p) - load(kept_b + at) * (factor * one_q));
      });
    return sums.cross * one_q - shift;
  } else {
    // With m = (p + q) / 2: log(p / m) = log 2 - softplus(log q - log p).
    Floats student[kUnroll] = {}, teacher[kUnroll] = {};
    for_each_vector(row,
                    [&](Floats a, Floats b, int64_t at, int64_t u) __attribute__((always_inline)) {
                      const Floats away = b - a - shift, soft = softplus(away);
                      const Floats p = load(kept_a + at) * one_p, q = load(kept_b + at) * one_q;
                      student[u] += p * (kLn2 - soft);
                      teacher[u] += q * (kLn2 - soft + away);
                      store(kept_a + at, p);
                      store(kept_b + at, kLn2 - soft);
                    });
    const float from_student = total(student), from_teacher = total(teacher);
    if constexpr (kGradient)
      for_each_vector(row, [&](Floats, Floats, int64_t at, int64_t) __attribute__((always_inline)) {
        write_row(row, at,
                  load(kept_a + at) * (load(kept_b + at) - from_student) * (0.5f * factor));
      });
    return 0.5f * (from_student + from_teacher);
  }
}

template <Kind kKind, typename T>
INLINE void rows(const Logits<T>& logits, const Logits<T>& teacher, int64_t begin, int64_t end,
                 const float* slope, bool gradient, const Result& out) {
  const int64_t size = logits.vocabulary;
  const Buffer kept_a(size + kLanes), kept_b(kKind == Kind::kReverseKl ? 0 : size + kLanes);
  for (int64_t r = begin; r < end; ++r) {
    T* row = logits.data + r * logits.stride;
    if (slope[r] == 0.0f) {
      out.divergence[r] = out.lse[r] = out.teacher_lse[r] = 0.0f;
      if (gradient) std::memset(row, 0, static_cast<size_t>(size) * sizeof(T));
      continue;
    }
    const T* other = teacher.data + r * teacher.stride;
    const float scale = logits.scale;
    const Pair<T> pair{
        row, other, size, scale, row_maximum(row, size) * scale, row_maximum(other, size) * scale};
    const Sums sums = exponentials<kKind>(pair, kept_a.get(), kept_b.get());
    const float factor = scale * slope[r];
    out.divergence[r] = gradient
                            ? finish<kKind, true>(pair, sums, kept_a.get(), kept_b.get(), factor)
                            : finish<kKind, false>(pair, sums, kept_a.get(), kept_b.get(), factor);
    out.lse[r] = pair.top_a + std::log(sums.student);
    out.teacher_lse[r] = pair.top_b + std::log(sums.teacher);
  }
}

template <typename T>
void rows_of(const Logits<T>& logits, const Logits<T>& teacher, int64_t begin, int64_t end,
             Kind kind, const float* slope, bool gradient, const Result& out) {
  switch (kind) {
    case Kind::kReverseKl:
      return rows<Kind::kReverseKl>(logits, teacher, begin, end, slope, gradient, out);
    case Kind::kForwardKl:
      return rows<Kind::kForwardKl>(logits, teacher, begin, end, slope, gradient, out);
    case Kind::kJensenShannon:
      return rows<Kind::kJensenShannon>(logits, teacher, begin, end, slope, gradient, out);
  }
}

}  // namespace

const DivergenceRows divergence_rows = {rows_of<float>, rows_of<Bf16>};

}  // namespace nemocascade::linear_distill_loss::NEMOCASCADE_LEVEL
