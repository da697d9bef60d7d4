// Which functions this processor runs, and how the work is cut for threads.
#pragma once

#include <cstdint>
#include <vector>

#include "mamba_core/core.h"

namespace nemocascade::mamba_core {

struct Functions {
  Forward* forward;
  Backward* backward;
};

// Those of a level (common/levels.h); null where it cannot be had.
Functions functions_of(const char* level);

// Consecutive documents.
struct Range {
  int64_t first;
  int64_t count;
};

// Ranges of like numbers of rows. They depend on the documents alone, not on the threads, so sums
// over ranges in their order are always the same.
std::vector<Range> cut(const std::vector<Document>& documents);

}  // namespace nemocascade::mamba_core
