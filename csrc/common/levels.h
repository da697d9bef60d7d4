// Levels of the processor that some files are compiled for, each in a namespace of its name: `base`
// everywhere, on x86-64 also `v3` (AVX2) and `v4` (AVX-512). See CMakeLists.txt and simd.h.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nemocascade {

// True if the library was compiled for the level and this processor has it.
inline bool has_level(const char* level) {
  if (std::strcmp(level, "base") == 0) return true;
#ifdef NEMOCASCADE_X86_LEVELS
#ifdef __clang__
  // Older versions of clang do not know the levels by name.
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  const bool has_v3 = __builtin_cpu_supports("x86-64-v3");
  const bool has_v4 = __builtin_cpu_supports("x86-64-v4");
#endif
  if (std::strcmp(level, "v3") == 0) return has_v3;
  if (std::strcmp(level, "v4") == 0) return has_v4;
#endif
  return false;
}

// The highest level of this processor, or the one that NEMOCASCADE_CPU_LEVEL names. Throws
// std::runtime_error if that level is unavailable.
inline const char* best_level() {
  static const char* const best = [] {
    if (const char* named = std::getenv("NEMOCASCADE_CPU_LEVEL")) {
      if (has_level(named)) return named;
      throw std::runtime_error(std::string("NEMOCASCADE_CPU_LEVEL is ") + named +
                               ": this processor or build has no such level; name base, v3 or v4, "
                               "or leave it unset");
    }
    return has_level("v4") ? "v4" : has_level("v3") ? "v3" : "base";
  }();
  return best;
}

}  // namespace nemocascade

// The table or function `name` of the processor's level; `space` contains the levels' namespaces.
#ifdef NEMOCASCADE_X86_LEVELS
#define NEMOCASCADE_BEST_OF(space, name)                                       \
  (std::strcmp(nemocascade::best_level(), "v4") == 0   ? space::level_v4::name \
   : std::strcmp(nemocascade::best_level(), "v3") == 0 ? space::level_v3::name \
                                                       : space::level_base::name)
#else
#define NEMOCASCADE_BEST_OF(space, name) (space::level_base::name)
#endif
