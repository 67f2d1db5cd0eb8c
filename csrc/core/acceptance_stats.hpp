// How often draft tokens are accepted, by how they were found.
//
// A bucket is the length of the match that a draft token comes from, and how united the vote for it
// was. The shares start from those measured on reasoning traces (bench/speculation.py) and follow
// what is recorded.

#pragma once

#include <array>

#include "types.hpp"

namespace s1 {

class AcceptanceStats {
 public:
  static constexpr int32_t kNumBuckets = 28;  // 7 match lengths x 4 kinds of vote

  // Bucket of a draft token that `votes` of `voters` occurrences propose after a match of
  // `match_len` tokens, earlier draft tokens included.
  static int32_t bucket_of(int32_t match_len, int32_t votes, int32_t voters);

  AcceptanceStats();  // the measured shares

  // Probability that a draft token of this bucket is accepted if all before it are.
  double probability(int32_t bucket) const;
  void record(int32_t bucket, bool accepted);

  // The same shares as a prior that new evidence soon outweighs. None is so small that the bucket
  // is never tried again.
  AcceptanceStats as_prior() const;

 private:
  struct Count {
    double tried = 0.0;
    double accepted = 0.0;
  };

  std::array<Count, kNumBuckets> counts_;
};

}  // namespace s1
