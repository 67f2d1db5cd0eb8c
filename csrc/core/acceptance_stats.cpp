#include "acceptance_stats.hpp"

#include <algorithm>

namespace s1 {

namespace {

// Accepted of 1,000 draft tokens, on 159 traces of QwQ-32B. Rows: matches of 2, 3, 4, 5 to 6,
// 7 to 9, 10 to 15, 16 tokens. Columns: a single voter; all agree; over 3/5 agree; fewer agree.
constexpr std::array<int32_t, AcceptanceStats::kNumBuckets> kMeasured = {416, 750, 518, 254,  //
                                                                         492, 773, 513, 282,  //
                                                                         548, 788, 537, 299,  //
                                                                         597, 814, 546, 330,  //
                                                                         675, 864, 582, 370,  //
                                                                         748, 895, 632, 412,  //
                                                                         850, 965, 683, 454};

constexpr double kPriorWeight = 16.0;  // a prior counts as this many draft tokens
constexpr double kMemory = 256.0;      // with this many, all counts are halved

}  // namespace

int32_t AcceptanceStats::bucket_of(int32_t match_len, int32_t votes, int32_t voters) {
  constexpr std::array<int32_t, 6> kRows = {3, 4, 5, 7, 10, 16};  // first match of rows 1 to 6
  const auto row = std::upper_bound(kRows.begin(), kRows.end(), match_len) - kRows.begin();
  const int32_t column = voters == 1 ? 0 : votes == voters ? 1 : 5 * votes > 3 * voters ? 2 : 3;
  return 4 * static_cast<int32_t>(row) + column;
}

AcceptanceStats::AcceptanceStats() {
  for (size_t bucket = 0; bucket < counts_.size(); ++bucket) {
    counts_[bucket] = {kPriorWeight, kPriorWeight * kMeasured[bucket] / 1000};
  }
}

double AcceptanceStats::probability(int32_t bucket) const {
  const Count& count = counts_[static_cast<size_t>(bucket)];
  return count.accepted / count.tried;
}

void AcceptanceStats::record(int32_t bucket, bool accepted) {
  Count& count = counts_[static_cast<size_t>(bucket)];
  ++count.tried;
  count.accepted += accepted;
  if (count.tried < kMemory) return;
  count.tried /= 2;
  count.accepted /= 2;
}

AcceptanceStats AcceptanceStats::as_prior() const {
  AcceptanceStats prior;
  for (int32_t bucket = 0; bucket < kNumBuckets; ++bucket) {
    prior.counts_[static_cast<size_t>(bucket)] = {
        kPriorWeight, std::max(kPriorWeight * probability(bucket), 1.0)};
  }
  return prior;
}

}  // namespace s1
