#include "mamba_core/schedule.h"

#include <algorithm>
#include <cstring>

namespace nemocascade::mamba_core {
namespace {

// At most this many ranges, of at least this many rows unless the pack has fewer.
constexpr int64_t kRanges = 32;
constexpr int64_t kRangeRows = 256;

#ifdef NEMOCASCADE_X86_LEVELS
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

Functions functions_of(const char* level) {
  if (std::strcmp(level, "base") == 0) return {level_base::forward, level_base::backward};
#ifdef NEMOCASCADE_X86_LEVELS
  if (std::strcmp(level, "v3") == 0 && has_v3()) return {level_v3::forward, level_v3::backward};
  if (std::strcmp(level, "v4") == 0 && has_v4()) return {level_v4::forward, level_v4::backward};
#endif
  return {nullptr, nullptr};
}

Functions functions() {
  static const Functions best = [] {
    for (const char* level : {"v4", "v3"})
      if (const Functions found = functions_of(level); found.forward != nullptr) return found;
    return functions_of("base");
  }();
  return best;
}

std::vector<Range> cut(const std::vector<Document>& documents) {
  const auto count = static_cast<int64_t>(documents.size());
  const int64_t enough = std::max(kRangeRows, (documents.back().end + kRanges - 1) / kRanges);
  std::vector<Range> ranges;
  int64_t first = 0, rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Document& document = documents[static_cast<size_t>(i)];
    rows += document.end - document.begin;
    if (rows < enough && i + 1 < count) continue;
    ranges.push_back({first, i + 1 - first});
    first = i + 1;
    rows = 0;
  }
  return ranges;
}

}  // namespace nemocascade::mamba_core
