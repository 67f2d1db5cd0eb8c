// Budget forcing (s1, arXiv 2501.19393) as a small integer state machine, one per sequence.
//
// This file is the definition: every other form (the device kernels, the reference in the tests)
// must agree with it token for token. It knows token ids only. Texts become ids when a request is
// compiled, and the caller appends the tokens that a transition returns.
//
//   phase     sampled   condition (n thinking tokens, w waits used)       append           next
//   OFF, ANS  any                                                         sampled          same
//   THINKING  trigger   ignored, wait text fits (n + |wait| < max)        wait             THINKING
//   THINKING  trigger   n < min, wait text does not fit                   nothing          THINKING
//   THINKING  trigger   otherwise                                         natural end ANSWERING
//   THINKING  other     n + 1 <  max                                      sampled          THINKING
//   THINKING  other     n + 1 == max                                      sampled, forced ANSWERING
//   THINKING  other     n     >= max (lowered from outside)               forced ANSWERING
//
// "ignored" means n < min or w < num_waits. If nothing is appended, the same position is sampled
// again with the triggers banned. An empty wait text (s1's "no string") has the same effect.
// Injected wait tokens count into n; delimiters and all that follows do not.

#pragma once

#include <memory>
#include <vector>

#include "types.hpp"

namespace s1 {

// Token ids of one reasoning format, shared by all sequences that use it.
struct BudgetFormat {
  std::vector<TokenId> triggers;         // each ends the thinking when sampled
  std::vector<TokenId> natural_end;      // appended instead of the trigger
  std::vector<TokenId> newline;          // precedes a forced end
  bool newline_always = false;           // false: only if the text does not end in a newline
  std::vector<uint8_t> ends_in_newline;  // [vocabulary] does the token's text end in a newline?

  bool is_trigger(TokenId token) const;
  bool is_newline(TokenId token) const {
    return token >= 0 && static_cast<size_t>(token) < ends_in_newline.size() &&
           ends_in_newline[static_cast<size_t>(token)] != 0;
  }
};

struct BudgetParams {
  std::shared_ptr<const BudgetFormat> format;  // null: the sequence does not think
  std::vector<TokenId> wait;                   // replaces an ignored trigger; may be empty
  std::vector<TokenId> forced_end;             // delimiter and the words that open the answer
  int32_t delimiter_len = 0;                   // leading tokens of forced_end that are delimiter
  int32_t min_thinking = 0;
  int32_t num_waits = 0;
};

struct BudgetState {
  Phase phase = Phase::kOff;
  EndReason end_reason = EndReason::kNone;
  EndReason max_reason = EndReason::kBudget;  // end_reason once max_thinking is reached
  bool banned = false;                        // triggers are banned at the next position
  bool tail_newline = false;                  // the last token's text ends in a newline
  int32_t thinking_tokens = 0;                // n
  int32_t max_thinking = 0;                   // max
  int32_t waits_used = 0;                     // w
};

// Tokens to append, in this order: the sampled token, the format's newline, the phrase.
struct Appended {
  bool sampled = false;
  bool newline = false;
  const std::vector<TokenId>* phrase = nullptr;
  int32_t delimiter_len = 0;  // leading tokens of the phrase that are delimiter

  bool operator==(const Appended&) const = default;
};

// Forces the end before anything is sampled if the budget is already used up (a budget of 0).
Appended start_thinking(const BudgetParams& params, BudgetState& state);

// One transition of the table above.
Appended advance(const BudgetParams& params, BudgetState& state, TokenId sampled);

// True if the triggers must be banned at the next position: after a forced phrase, and while an
// end would be ignored without a wait text to replace it.
bool bans_triggers(const BudgetParams& params, const BudgetState& state);

// Lowers the maximum of a live sequence; never raises it.
void limit_thinking(BudgetState& state, int32_t max_thinking, EndReason reason);

}  // namespace s1
