#include "packing/packing.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <queue>
#include <utility>

#include "packing/length_pool.h"

namespace nemocascade::packing {
namespace {

using Wide = __int128;  // n * capacity^2 may pass 2^63

// The documents reserved to close the bins: an eighth of the tokens, and at least four documents a
// bin. With less, no document fits some bins; with more, balance may be worse. Where that needs too
// many bins, twice as much is reserved, and then four times.
constexpr int64_t kClosingShare = 8;
constexpr int64_t kClosingDocuments = 4;
constexpr int kAttempts = 3;
// Balance may cost one bin in a thousand more than first-fit-decreasing, or one if there are at
// least a hundred. First-fit-decreasing puts documents of similar lengths, and so of similar types,
// into one bin.
constexpr int64_t kExtraBinsShare = 1000;
constexpr int64_t kLeastBinsForOneExtra = 100;

// splitmix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Uniform in 0..bound-1 up to a bias of bound / 2^64.
  int64_t below(int64_t bound) {
    state_ += 0x9E3779B97F4A7C15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    z ^= z >> 31;
    return static_cast<int64_t>((static_cast<unsigned __int128>(z) * bound) >> 64);
  }

  void shuffle(std::vector<int64_t>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  uint64_t state_;
};

// Documents by descending length; the order of equal lengths is random.
struct Sorted {
  std::vector<int64_t> documents;
  std::vector<int64_t> lengths;
};

Sorted sort_by_length(const int64_t* lengths, int64_t count, int64_t capacity, Random& random) {
  std::vector<int64_t> shuffled(count);
  std::iota(shuffled.begin(), shuffled.end(), 0);
  random.shuffle(shuffled);
  // Counting sort: next[l] is the position of the next document of length l.
  std::vector<int64_t> next(capacity + 2, 0);
  for (int64_t i = 0; i < count; ++i) ++next[lengths[i] - 1];
  for (int64_t length = capacity - 1; length >= 0; --length) next[length] += next[length + 1];
  Sorted sorted{std::vector<int64_t>(count), std::vector<int64_t>(count)};
  for (const int64_t document : shuffled) {
    const int64_t position = next[lengths[document]]++;
    sorted.documents[position] = document;
    sorted.lengths[position] = lengths[document];
  }
  return sorted;
}

// The bin of each document (by its position in the sorted order), and the contents of each bin.
class Bins {
 public:
  Bins(int64_t documents, int64_t capacity) : bin_of(documents), capacity_(capacity) {}

  int64_t size() const { return static_cast<int64_t>(fills.size()); }
  int64_t space(int64_t bin) const { return capacity_ - fills[bin]; }

  int64_t open() {
    fills.push_back(0);
    squares.push_back(0);
    return size() - 1;
  }

  void place(int64_t position, int64_t length, int64_t bin) {
    bin_of[position] = bin;
    fills[bin] += length;
    squares[bin] += length * length;
  }

  // The length-weighted mean length that would bring a bin with space to `level` as it fills up.
  double density(int64_t bin, int64_t level) const {
    return static_cast<double>(level - squares[bin]) / static_cast<double>(space(bin));
  }

  std::vector<int64_t> bin_of;
  std::vector<int64_t> fills;
  std::vector<int64_t> squares;

 private:
  int64_t capacity_;
};

struct Candidate {
  double density;
  int64_t bin;

  // std::priority_queue yields the greatest: the densest, and among equals the first bin.
  bool operator<(const Candidate& other) const {
    return density != other.density ? density < other.density : bin > other.bin;
  }
};

// The sum of squares that every bin can reach, if a document whose own square is above it has a bin
// to itself.
int64_t balance_level(const std::vector<int64_t>& lengths, int64_t bins) {
  Wide rest = 0;
  for (const int64_t length : lengths) rest += static_cast<Wide>(length) * length;
  for (const int64_t length : lengths) {
    const Wide square = static_cast<Wide>(length) * length;
    if (bins == 1 || square * bins <= rest) break;
    rest -= square;
    --bins;
  }
  return static_cast<int64_t>(rest / bins);
}

// Number of the longest documents that are spread; the others close the bins.
int64_t count_spread(const std::vector<int64_t>& lengths, int64_t tokens, int64_t bins,
                     int attempt) {
  const int64_t share = kClosingShare >> attempt, documents = kClosingDocuments << attempt;
  int64_t spread = static_cast<int64_t>(lengths.size());
  int64_t closing_tokens = 0;
  int64_t closing_documents = 0;
  while (spread > 0 && (closing_tokens * share < tokens || closing_documents < documents * bins)) {
    closing_tokens += lengths[--spread];
    ++closing_documents;
  }
  return spread;
}

// Puts each of the longest documents, longest first, into the bin that needs length most.
void spread(const std::vector<int64_t>& lengths, int64_t count, int64_t level, Bins& bins) {
  std::priority_queue<Candidate> candidates;
  std::priority_queue<std::pair<int64_t, int64_t>> waiting;  // (space, bin): too full for now
  const auto offer = [&](int64_t bin) { candidates.push({bins.density(bin, level), bin}); };
  for (int64_t bin = 0; bin < bins.size(); ++bin) offer(bin);
  for (int64_t position = 0; position < count; ++position) {
    const int64_t length = lengths[position];
    for (; !waiting.empty() && waiting.top().first >= length; waiting.pop()) {
      offer(waiting.top().second);
    }
    while (!candidates.empty() && bins.space(candidates.top().bin) < length) {
      const int64_t bin = candidates.top().bin;
      waiting.emplace(bins.space(bin), bin);
      candidates.pop();
    }
    int64_t bin;
    if (candidates.empty()) {
      bin = bins.open();
    } else {
      bin = candidates.top().bin;
      candidates.pop();
    }
    bins.place(position, length, bin);
    if (bins.space(bin) > 0) offer(bin);
  }
}

// The longest document that fits; with `look_ahead`, one whose remainder is not too short for every
// document, if there is one.
int64_t pick(const LengthPool& pool, int64_t space, bool look_ahead) {
  const int64_t longest = pool.longest_at_most(space);
  const int64_t remainder = space - longest;
  if (!look_ahead || longest == 0 || remainder == 0) return longest;
  const int64_t shortest = pool.shortest();
  if (remainder >= shortest) return longest;
  const int64_t shorter = pool.longest_at_most(space - shortest);
  return shorter > 0 ? shorter : longest;
}

// Packs the documents from `first` on: bin after bin, always the longest document that fits. This
// is first-fit-decreasing: a document goes to the first bin that has space for it in its turn.
void close(const std::vector<int64_t>& lengths, int64_t first, int64_t capacity, int64_t level,
           bool look_ahead, Bins& bins) {
  LengthPool pool(capacity);
  std::vector<int64_t> next(capacity + 1, -1);
  for (int64_t position = static_cast<int64_t>(lengths.size()); position-- > first;) {
    pool.add(lengths[position]);
    next[lengths[position]] = position;
  }
  std::vector<Candidate> order;
  for (int64_t bin = 0; bin < bins.size(); ++bin) {
    if (bins.space(bin) > 0) order.push_back({bins.density(bin, level), bin});
  }
  std::sort(order.rbegin(), order.rend());
  for (size_t turn = 0; !pool.empty(); ++turn) {
    const int64_t bin = turn < order.size() ? order[turn].bin : bins.open();
    while (const int64_t length = pick(pool, bins.space(bin), look_ahead)) {
      pool.remove(length);
      bins.place(next[length]++, length, bin);
    }
  }
}

Bins assign(const std::vector<int64_t>& lengths, int64_t capacity) {
  const int64_t count = static_cast<int64_t>(lengths.size());
  Bins first_fit(count, capacity);
  close(lengths, 0, capacity, 0, false, first_fit);
  if (count == 0) return first_fit;

  const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const int64_t halves =
      std::count_if(lengths.begin(), lengths.end(), [&](int64_t l) { return 2 * l > capacity; });
  const int64_t least = std::max((tokens + capacity - 1) / capacity, halves);
  const int64_t level = balance_level(lengths, least);
  const int64_t most =
      first_fit.size() + std::max<int64_t>(first_fit.size() / kExtraBinsShare,
                                           first_fit.size() >= kLeastBinsForOneExtra);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    Bins balanced(count, capacity);
    for (int64_t bin = 0; bin < least; ++bin) balanced.open();
    const int64_t spread_count = count_spread(lengths, tokens, least, attempt);
    spread(lengths, spread_count, level, balanced);
    close(lengths, spread_count, capacity, level, true, balanced);
    if (balanced.size() <= most) return balanced;
  }
  return first_fit;
}

// Makes groups of bins of nearly equal work, the most work first, sorted by increasing work, and
// puts the groups in random order. The remaining bins have the least work and come last.
std::vector<int64_t> order_bins(const Bins& bins, int64_t group, WorkModel work, Random& random) {
  std::vector<double> costs(bins.size());
  for (int64_t bin = 0; bin < bins.size(); ++bin) {
    costs[bin] = work.linear * static_cast<double>(bins.fills[bin]) +
                 work.quadratic * static_cast<double>(bins.squares[bin]);
  }
  std::vector<int64_t> by_cost(bins.size());
  std::iota(by_cost.begin(), by_cost.end(), 0);
  std::stable_sort(by_cost.begin(), by_cost.end(),
                   [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  std::vector<int64_t> groups(bins.size() / group);
  std::iota(groups.begin(), groups.end(), 0);
  random.shuffle(groups);
  groups.push_back(bins.size() / group);
  std::vector<int64_t> order;
  order.reserve(bins.size());
  for (const int64_t index : groups) {
    const int64_t end = std::min((index + 1) * group, bins.size());
    for (int64_t i = end; i-- > index * group;) order.push_back(by_cost[i]);
  }
  return order;
}

}  // namespace

Plan plan_packing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t group,
                  WorkModel work, uint64_t seed) {
  Random random(seed);
  const Sorted sorted = sort_by_length(lengths, count, capacity, random);
  const Bins bins = assign(sorted.lengths, capacity);
  const std::vector<int64_t> order = order_bins(bins, group, work, random);

  Plan plan;
  std::vector<int64_t> rank(bins.size());  // a bin's position in the order
  for (int64_t place = 0; place < bins.size(); ++place) {
    rank[order[place]] = place;
    plan.fills.push_back(bins.fills[order[place]]);
    plan.squares.push_back(bins.squares[order[place]]);
  }
  plan.bin_offsets.assign(bins.size() + 1, 0);
  for (const int64_t bin : bins.bin_of) ++plan.bin_offsets[rank[bin] + 1];
  std::partial_sum(plan.bin_offsets.begin(), plan.bin_offsets.end(), plan.bin_offsets.begin());
  std::vector<int64_t> next(plan.bin_offsets.begin(), plan.bin_offsets.end() - 1);
  plan.documents.resize(count);
  for (int64_t position = 0; position < count; ++position) {
    plan.documents[next[rank[bins.bin_of[position]]]++] = sorted.documents[position];
  }
  return plan;
}

}  // namespace nemocascade::packing
