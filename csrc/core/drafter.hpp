// Guesses how a sequence goes on, from how it went on before: reasoning repeats itself.
//
// Owns an index over the tokens of one sequence, and what it has learnt of how often its guesses
// are right. Knows nothing of budgets, steps or models; a guess costs its maker nothing.
//
// The places that a guess comes from are the latest kMaxPlaces at which the last kMinMatch tokens
// stand too. Those that agree with the end of the sequence for longest (up to kMaxMatch tokens)
// vote, token by token; a tie goes to the latest place, and only those that voted for the winner
// vote on. A place that reaches the end of the sequence goes on in the guesses themselves.
//
// How likely a guess is right depends on the length of the match, guesses included, and on how
// united the vote is: its level. The shares of right guesses by level start from those of the
// sequences before, the first from those measured on reasoning traces
// (bench/studies/draft_acceptance.py), and follow the sequence's own.

#pragma once

#include <array>
#include <span>
#include <vector>

#include "types.hpp"

namespace s1 {

struct DraftToken {
  TokenId token = 0;
  int32_t level = 0;    // for learn()
  double chance = 0.0;  // that this guess and all before it are right
};

// For each pair of tokens the positions behind its occurrences, latest first.
class PairIndex {
 public:
  // Takes all of `tokens` but the last: nobody knows yet what follows the pair that ends there.
  void grow(std::span<const TokenId> tokens);
  // Position behind the latest occurrence of the pair that ends before position `end`; 0: none.
  int32_t latest(std::span<const TokenId> tokens, size_t end) const;
  // Position behind the occurrence before the one that `position` is behind; 0: none.
  int32_t before(int32_t position) const { return before_[static_cast<size_t>(position)]; }

 private:
  // One for each pair that occurs; the table holds twice as many, and position 0 where none is.
  struct Entry {
    uint64_t pair = 0;
    int32_t latest = 0;
  };

  size_t find(uint64_t pair) const;
  void widen();

  std::vector<Entry> entries_;   // open addressing, a power of two
  std::vector<int32_t> before_;  // by position
  size_t num_pairs_ = 0;
};

// Shares of right guesses by level.
class AcceptanceStats {
 public:
  static constexpr int32_t kLevels = 28;  // 7 of the match, 4 of the vote

  AcceptanceStats();  // as measured

  double chance(int32_t level) const;
  void learn(int32_t level, bool right);
  // The same shares, as a beginning that soon gives way; none so small that nobody tries again.
  AcceptanceStats as_prior() const;

 private:
  struct Count {
    double tried = 0.0;
    double right = 0.0;
  };

  std::array<Count, kLevels> counts_;
};

class Drafter {
 public:
  static constexpr int32_t kMinMatch = 2;   // of PairIndex
  static constexpr int32_t kMaxMatch = 16;  // longer ones count as this
  static constexpr int32_t kMaxPlaces = 16;

  explicit Drafter(const AcceptanceStats& prior = {}) : record_(prior) {}

  // Appends to `guesses` up to `limit` of what follows `tokens`, all of the sequence so far, as
  // long as their chance is at least `least`. Returns their number.
  int32_t propose(std::span<const TokenId> tokens, int32_t limit, double least,
                  std::vector<DraftToken>& guesses);

  // A guess of this level came up, all before it having been right: was it?
  void learn(int32_t level, bool right) { record_.learn(level, right); }

 private:
  PairIndex index_;
  AcceptanceStats record_;
};

}  // namespace s1
