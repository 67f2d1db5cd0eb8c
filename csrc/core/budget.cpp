#include "budget.hpp"

#include <algorithm>

namespace s1 {

bool BudgetFormat::is_trigger(TokenId token) const {
  return std::find(triggers.begin(), triggers.end(), token) != triggers.end();
}

namespace {

// A token that completes a marker, or a trigger: how many held tokens are part of the end.
struct End {
  bool is_trigger = false;
  int32_t num_held = 0;
};

void forget_match(BudgetState& state) {
  state.match = 0;
  state.held = 0;
  state.starts = 0;
}

// Appends the sampled token, which is held if it may belong to a marker, and releases the held
// tokens that no longer may.
void append_sampled(const BudgetFormat& format, BudgetState& state, TokenId sampled) {
  const EndMatcher& matcher = format.end_markers;
  if (matcher.empty()) {
    state.tail_newline = format.is_newline(sampled);
    state.banned = false;
    ++state.thinking_tokens;
    return;
  }
  const int32_t held_before = state.held;
  state.match = matcher.next(state.match, sampled);
  if (state.match == 0) {
    forget_match(state);
  } else {
    state.starts = matcher.append(state.starts, sampled);
    state.held = EndMatcher::count_tokens(state.starts, matcher.depth(state.match));
  }
  const int32_t released = held_before + 1 - state.held;
  state.thinking_tokens += released;
  if (released > 0) {  // a token that was held ends in no newline, because markers have none
    state.tail_newline = state.held == 0 && format.is_newline(sampled);
    state.banned = false;
  }
}

// Drops half a marker, except for the tokens that the minimum lacks. The last held token is the
// sampled one if `sampled`.
Appended force_end(const BudgetParams& params, BudgetState& state, bool sampled) {
  const int32_t lacking = std::min(params.min_thinking, state.max_thinking) - state.thinking_tokens;
  const int32_t released = std::clamp(lacking, 0, state.held);
  int32_t dropped = state.held - released;
  if (released > 0) state.tail_newline = false;
  state.thinking_tokens += released;
  forget_match(state);
  if (sampled && dropped > 0) {
    sampled = false;
    --dropped;
  }
  const bool newline = params.format->newline_always || !state.tail_newline;
  state.phase = Phase::kAnswering;
  state.end_reason = state.max_reason;
  return {.dropped = dropped,
          .sampled = sampled,
          .newline = newline,
          .phrase = &params.forced_end,
          .delimiter_len = params.delimiter_len};
}

Appended natural_end(const BudgetParams& params, BudgetState& state, End end) {
  const BudgetFormat& format = *params.format;
  const std::vector<TokenId>& rest = end.is_trigger ? format.natural_end : format.after_marker;
  const int32_t dropped = end.is_trigger ? state.held : 0;
  forget_match(state);
  state.phase = Phase::kAnswering;
  state.end_reason = EndReason::kNatural;
  return {.dropped = dropped,
          .sampled = !end.is_trigger,
          .marker_len = end.is_trigger ? 0 : end.num_held + 1,
          .phrase = &rest,
          .delimiter_len = static_cast<int32_t>(rest.size())};
}

Appended append_wait(const BudgetParams& params, BudgetState& state, End end, int32_t thinking) {
  state.banned = true;
  state.waits_used += 1;
  if (params.wait.empty()) return {};
  state.thinking_tokens = thinking + static_cast<int32_t>(params.wait.size());
  state.tail_newline = params.format->is_newline(params.wait.back());
  forget_match(state);
  return {.dropped = end.num_held, .phrase = &params.wait};
}

Appended on_end(const BudgetParams& params, BudgetState& state, End end) {
  // Held tokens before the marker are thinking.
  const int32_t thinking = state.thinking_tokens + state.held - end.num_held;
  const bool below_min = thinking < params.min_thinking;
  if (below_min || state.waits_used < params.num_waits) {
    const int64_t after_wait = thinking + static_cast<int64_t>(params.wait.size());
    if (after_wait < state.max_thinking) return append_wait(params, state, end, thinking);
    if (below_min && thinking < state.max_thinking) {
      state.banned = true;
      return {};
    }
  }
  state.thinking_tokens = thinking;
  return natural_end(params, state, end);
}

}  // namespace

Appended start_thinking(const BudgetParams& params, BudgetState& state) {
  if (state.phase != Phase::kThinking || state.thinking_tokens < state.max_thinking) return {};
  return force_end(params, state, false);
}

Appended advance(const BudgetParams& params, BudgetState& state, TokenId sampled) {
  if (state.phase != Phase::kThinking) return {.sampled = true};
  const BudgetFormat& format = *params.format;
  if (format.is_trigger(sampled)) return on_end(params, state, {true, state.held});
  const int32_t counted = state.thinking_tokens + state.held;
  if (counted >= state.max_thinking) return force_end(params, state, false);
  const uint8_t next = format.end_markers.next(state.match, sampled);
  if (next >= EndMatcher::kComplete) {
    const int32_t bytes_before = next - EndMatcher::kComplete;
    return on_end(params, state, {false, EndMatcher::count_tokens(state.starts, bytes_before)});
  }
  append_sampled(format, state, sampled);
  const bool full = state.thinking_tokens + state.held == state.max_thinking;
  if (full) return force_end(params, state, true);
  return {.sampled = true};
}

bool bans_triggers(const BudgetParams& params, const BudgetState& state) {
  if (state.phase != Phase::kThinking) return false;
  return state.banned || (params.wait.empty() && state.thinking_tokens < params.min_thinking &&
                          state.thinking_tokens < state.max_thinking);
}

void limit_thinking(BudgetState& state, int32_t max_thinking, EndReason reason) {
  if (state.phase != Phase::kThinking || max_thinking >= state.max_thinking) return;
  state.max_thinking = std::max(max_thinking, 0);
  state.max_reason = reason;
}

}  // namespace s1
