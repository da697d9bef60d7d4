// Packs documents into bins of a fixed capacity and orders the bins so that their work is balanced.
// nemocascade/data/packing.py explains the algorithm; packing_reference.py is the same algorithm in
// plain Python, and both plans are identical.
#pragma once

#include <cstdint>
#include <vector>

namespace nemocascade::packing {

// Work of a bin: linear * sum(length) + quadratic * sum(length^2).
struct WorkModel {
  double linear;
  double quadratic;
};

struct Plan {
  std::vector<int64_t> documents;    // [D] indices into the lengths, bin after bin
  std::vector<int64_t> bin_offsets;  // [B + 1] bin b holds documents[bin_offsets[b] .. [b + 1])
  std::vector<int64_t> fills;        // [B] tokens
  std::vector<int64_t> squares;      // [B] sum of the squared lengths
};

// `lengths[count]` must lie in 1..capacity. Bins are ordered in groups of `group` of nearly equal
// work; the seed determines the order of the groups and of equally long documents.
Plan plan_packing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t group,
                  WorkModel work, uint64_t seed);

}  // namespace nemocascade::packing
