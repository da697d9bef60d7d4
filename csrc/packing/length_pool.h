// The multiset of the lengths still to be packed, with the query of packing: the longest length
// that fits. A bitmap of the lengths present, and bitmaps of its non-zero words above it, need one
// step a level: three levels of 64 cover lengths up to 262,144.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace nemocascade::packing {

class LengthPool {
 public:
  explicit LengthPool(int64_t capacity) : counts_(capacity + 1, 0) {
    int64_t words = capacity + 1;
    do {
      words = (words + 63) / 64;
      levels_.emplace_back(words, 0);
    } while (words > 1);
  }

  bool empty() const { return levels_.back()[0] == 0; }

  void add(int64_t length) {
    if (counts_[length]++ > 0) return;
    int64_t position = length;
    for (auto& level : levels_) {
      level[position / 64] |= uint64_t{1} << (position % 64);
      position /= 64;
    }
  }

  void remove(int64_t length) {
    if (--counts_[length] > 0) return;
    int64_t position = length;
    for (auto& level : levels_) {
      level[position / 64] &= ~(uint64_t{1} << (position % 64));
      if (level[position / 64] != 0) return;
      position /= 64;
    }
  }

  // The longest length <= limit, or 0 if there is none.
  int64_t longest_at_most(int64_t limit) const {
    int64_t position = limit;
    for (size_t level = 0; level < levels_.size(); ++level) {
      const uint64_t below = ~uint64_t{0} >> (63 - position % 64);
      const uint64_t word = levels_[level][position / 64] & below;
      if (word != 0) return descend_longest(level, position / 64 * 64 + last_bit(word));
      if (position / 64 == 0) return 0;
      position = position / 64 - 1;
    }
    return 0;
  }

  // The shortest length, or 0 if the pool is empty.
  int64_t shortest() const {
    if (empty()) return 0;
    int64_t position = 0;
    for (size_t level = levels_.size(); level-- > 0;) {
      position = position * 64 + std::countr_zero(levels_[level][position]);
    }
    return position;
  }

 private:
  static int64_t last_bit(uint64_t word) { return 63 - std::countl_zero(word); }

  int64_t descend_longest(size_t level, int64_t position) const {
    while (level-- > 0) position = position * 64 + last_bit(levels_[level][position]);
    return position;
  }

  std::vector<int32_t> counts_;
  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace nemocascade::packing
