// Notices that text goes round in circles: the same phrase again and again.
//
// For each period p up to kMaxPeriod it counts how many of the latest tokens equal the one p before
// them. A count of m is a phrase of p tokens that stands there m / p + 1 times in a row. Exact, one
// comparison a period and token, no hashing.

#pragma once

#include <array>
#include <span>

#include "types.hpp"

namespace s1 {

class LoopDetector {
 public:
  static constexpr int32_t kMaxPeriod = 64;

  // Takes the last of `tokens`, which are all so far. True if they end in one phrase of at most
  // kMaxPeriod tokens standing at least `repeats` times in a row. Call once for each token.
  bool push(std::span<const TokenId> tokens, int32_t repeats) {
    const size_t last = tokens.size() - 1;
    bool found = false;
    for (size_t period = 1; period <= kMaxPeriod; ++period) {
      int32_t& run = runs_[period - 1];
      const bool equal = period <= last && tokens[last] == tokens[last - period];
      run = equal ? run + 1 : 0;
      found = found || run >= (repeats - 1) * static_cast<int32_t>(period);
    }
    return found;
  }

 private:
  std::array<int32_t, kMaxPeriod> runs_{};
};

}  // namespace s1
