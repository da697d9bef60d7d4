#include "mamba_core/schedule.h"

#include <algorithm>
#include <cstring>

#include "common/levels.h"

namespace nemocascade::mamba_core {
namespace {

// At most this many ranges, of at least this many rows unless the pack has fewer.
constexpr int64_t kRanges = 32;
constexpr int64_t kRangeRows = 256;

}  // namespace

Functions functions_of(const char* level) {
  if (!has_level(level)) return {nullptr, nullptr};
#ifdef NEMOCASCADE_X86_LEVELS
  if (std::strcmp(level, "v3") == 0) return {level_v3::forward, level_v3::backward};
  if (std::strcmp(level, "v4") == 0) return {level_v4::forward, level_v4::backward};
#endif
  return {level_base::forward, level_base::backward};
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
