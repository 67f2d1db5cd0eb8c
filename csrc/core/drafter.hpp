// Drafts how a sequence goes on from what it said before (prompt lookup decoding): reasoning
// repeats itself.
//
// Owns an index over the tokens of one sequence and its acceptance statistics. Knows nothing of
// budgets, steps or models; a draft costs no model time.
//
// Candidates are the latest kMaxOccurrences occurrences of the last kMinMatch tokens. Those that
// agree with the end of the sequence for the most tokens (up to kMaxMatch) vote, token by token. A
// tie goes to the latest occurrence, and only the voters for the winner vote on the next token. An
// occurrence that reaches the end of the sequence continues in the draft itself.
//
// The acceptance statistics start from those of earlier sequences and follow the sequence's own.

#pragma once

#include <span>
#include <vector>

#include "acceptance_stats.hpp"
#include "bigram_index.hpp"
#include "types.hpp"

namespace s1 {

struct DraftToken {
  TokenId token = 0;
  int32_t bucket = 0;        // of AcceptanceStats
  double probability = 0.0;  // that this token and all before it in the draft are accepted
};

class Drafter {
 public:
  static constexpr int32_t kMinMatch = 2;   // a bigram
  static constexpr int32_t kMaxMatch = 16;  // longer matches count as this
  static constexpr int32_t kMaxOccurrences = 16;

  explicit Drafter(const AcceptanceStats& prior = {}) : stats_(prior) {}

  // Appends to `draft` up to `limit` tokens that may follow `tokens`, all tokens of the sequence so
  // far, of which `num_settled` stay. Stops before the first whose probability is below
  // `min_probability`. Returns the number of tokens appended.
  int32_t propose(std::span<const TokenId> tokens, int32_t num_settled, int32_t limit,
                  double min_probability, std::vector<DraftToken>& draft);

  // Records whether a draft token of this bucket was accepted, all before it being accepted.
  void record(int32_t bucket, bool accepted) { stats_.record(bucket, accepted); }

 private:
  BigramIndex index_;
  AcceptanceStats stats_;
};

}  // namespace s1
