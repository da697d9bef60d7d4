// Levels of the processor that some files are compiled for, each in a namespace of its name: `base`
// everywhere, on x86-64 also `v3` (AVX2) and `v4` (AVX-512). See CMakeLists.txt and simd.h.
#pragma once

#include <cstring>

// A table of functions whose source is compiled for each level: `name` stands in the namespace of
// each one. NEMOCASCADE_LEVELS_OF declares them, NEMOCASCADE_BEST_OF is the processor's.
#ifdef NEMOCASCADE_X86_LEVELS
#define NEMOCASCADE_LEVELS_OF(Table, name) \
  namespace level_base {                   \
  extern const Table name;                 \
  }                                        \
  namespace level_v3 {                     \
  extern const Table name;                 \
  }                                        \
  namespace level_v4 {                     \
  extern const Table name;                 \
  }
#define NEMOCASCADE_BEST_OF(space, name)                                       \
  (std::strcmp(nemocascade::best_level(), "v4") == 0   ? space::level_v4::name \
   : std::strcmp(nemocascade::best_level(), "v3") == 0 ? space::level_v3::name \
                                                       : space::level_base::name)
#else
#define NEMOCASCADE_LEVELS_OF(Table, name) \
  namespace level_base {                   \
  extern const Table name;                 \
  }
#define NEMOCASCADE_BEST_OF(space, name) (space::level_base::name)
#endif

namespace nemocascade {

// Whether the library was compiled for the level and this processor has it.
inline bool has_level(const char* level) {
  if (std::strcmp(level, "base") == 0) return true;
#ifdef NEMOCASCADE_X86_LEVELS
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(level, "v3") == 0) return has_v3;
  if (std::strcmp(level, "v4") == 0)
    return has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

// The highest that this processor has.
inline const char* best_level() {
  static const char* const best = has_level("v4") ? "v4" : has_level("v3") ? "v3" : "base";
  return best;
}

}  // namespace nemocascade
