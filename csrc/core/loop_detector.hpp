// Detects text that repeats one phrase again and again.
//
// For each period p up to kMaxPeriod it counts how many of the latest tokens equal the token p
// before them. A count of m means that a phrase of p tokens occurs m / p + 1 times in a row. The
// result is exact: one comparison per period and token, no hashing.

#pragma once

#include <array>
#include <span>

#include "types.hpp"

namespace s1 {

class LoopDetector {
 public:
  static constexpr int32_t kMaxPeriod = 64;

  // Counts the last token of `tokens`, which holds all tokens so far; call once per token. Returns
  // true if `tokens` ends in one phrase, at most kMaxPeriod long, at least `repeats` times in a
  // row.
  bool push(std::span<const TokenId> tokens, int32_t repeats) {
    const size_t last = tokens.size() - 1;
    bool is_loop = false;
    for (size_t period = 1; period <= kMaxPeriod; ++period) {
      int32_t& matches = matches_[period - 1];
      const bool equal = period <= last && tokens[last] == tokens[last - period];
      matches = equal ? matches + 1 : 0;
      is_loop = is_loop || matches >= (repeats - 1) * static_cast<int32_t>(period);
    }
    return is_loop;
  }

 private:
  std::array<int32_t, kMaxPeriod> matches_{};  // latest tokens that equal the one `period` before
};

}  // namespace s1
