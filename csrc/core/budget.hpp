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
//   THINKING  other     n + h     >= max (lowered from outside)           forced ANSWERING
//   THINKING  completes ignored, wait text fits                           wait             THINKING
//   THINKING  completes n < min, wait text does not fit                   nothing          THINKING
//   THINKING  completes otherwise                                  sampled, rest ANSWERING
//   THINKING  other     n + h + 1 <  max                                  sampled          THINKING
//   THINKING  other     n + h + 1 == max                                  sampled, forced ANSWERING
//
// "ignored" means n < min or w < num_waits. If nothing is appended, the same position is sampled
// again with the triggers banned. An empty wait text (s1's "no string") has the same effect.
// Injected wait tokens count into n; delimiters and all that follows do not.
//
// End markers of several tokens (end_matcher.hpp; formats whose ends are all triggers have none,
// and then h = 0 and nothing completes). While the text ends in the beginning of a marker, the
// tokens that hold it are *held*: h of them, appended and computed, but not part of the output yet.
//   - A held token counts into n once it can no longer belong to a marker. It is released then.
//   - "completes": the sampled token completes a marker. At its natural end the marker's tokens
//     become delimiter, and the rest of the format's natural end is appended. The text before the
//     marker in its first token belongs to the thinking, the text after it in its last token to the
//     answer. If the end is ignored, all tokens that hold part of the marker are dropped, a first
//     token that also holds other text included, and the wait text is appended.
//   - Half a marker is dropped before anything else is appended: a forced end, a wait text, the
//     natural end that replaces a trigger. A forced end keeps as many held tokens as the minimum
//     still lacks: they are released and the others dropped.
//   - While triggers are banned, so are the tokens that would complete a marker. After a forced
//     phrase the ban holds until a token counts, so a marker cannot follow it directly.
//   - Only sampled tokens match. A forced phrase, and a token without text, begin anew.

#pragma once

#include <memory>
#include <vector>

#include "end_matcher.hpp"
#include "types.hpp"

namespace s1 {

// Token ids of one reasoning format, shared by all sequences that use it.
struct BudgetFormat {
  std::vector<TokenId> triggers;         // each ends the thinking when sampled
  std::vector<TokenId> natural_end;      // appended instead of the trigger
  std::vector<TokenId> newline;          // precedes a forced end
  bool newline_always = false;           // false: only if the text does not end in a newline
  std::vector<uint8_t> ends_in_newline;  // [vocabulary] does the token's text end in a newline?
  EndMatcher end_markers{};              // ends of several tokens
  std::vector<TokenId> after_marker{};   // follows a marker that the model wrote

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
  int32_t match = 0;                          // state of the end matcher
  int32_t held = 0;                           // h: latest tokens, which may begin a marker
  TokenStarts starts = 0;                     // of the held tokens
};

// What a transition does to the tokens, in this order: drops the last ones, appends the sampled
// token, makes the last ones delimiter, appends the format's newline and the phrase.
struct Appended {
  int32_t dropped = 0;  // held tokens
  bool sampled = false;
  int32_t marker_len = 0;  // tokens of a complete marker, the sampled one included
  bool newline = false;
  const std::vector<TokenId>* phrase = nullptr;
  int32_t delimiter_len = 0;  // leading tokens of the phrase that are delimiter

  bool operator==(const Appended&) const = default;
};

// Forces the end before anything is sampled if the budget is already used up (a budget of 0).
Appended start_thinking(const BudgetParams& params, BudgetState& state);

// One transition of the table above.
Appended advance(const BudgetParams& params, BudgetState& state, TokenId sampled);

// True if the triggers must be banned at the next position, and all tokens that would complete a
// marker: after a forced phrase, and while an end would be ignored without a wait text to replace
// it.
bool bans_triggers(const BudgetParams& params, const BudgetState& state);

// The same for samplers: 0, or 1 + the state of the end matcher, which decides what completes.
inline uint8_t ban_code(const BudgetParams& params, const BudgetState& state) {
  return bans_triggers(params, state) ? static_cast<uint8_t>(1 + state.match) : uint8_t{0};
}

// Ban code of a position where the sequence must not end yet: its stop tokens are banned.
inline constexpr uint8_t kBanEnds = 255;
static_assert(kBanEnds > EndMatcher::kMaxStates, "no state of the end matcher has this code");

// Lowers the maximum of a live sequence; never raises it.
void limit_thinking(BudgetState& state, int32_t max_thinking, EndReason reason);

}  // namespace s1
