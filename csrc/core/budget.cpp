#include "budget.hpp"

#include <algorithm>

namespace s1 {

bool BudgetFormat::is_trigger(TokenId token) const {
  return std::find(triggers.begin(), triggers.end(), token) != triggers.end();
}

namespace {

Appended append_sampled(const BudgetParams& params, BudgetState& state, TokenId sampled) {
  state.tail_newline = params.format->is_newline(sampled);
  ++state.thinking_tokens;
  return {.sampled = true};
}

Appended force_end(const BudgetParams& params, BudgetState& state, bool sampled) {
  const bool newline = params.format->newline_always || !state.tail_newline;
  state.phase = Phase::kAnswering;
  state.end_reason = state.max_reason;
  return {sampled, newline, &params.forced_end, params.delimiter_len};
}

Appended natural_end(const BudgetParams& params, BudgetState& state) {
  const std::vector<TokenId>& end = params.format->natural_end;
  state.phase = Phase::kAnswering;
  state.end_reason = EndReason::kNatural;
  return {.phrase = &end, .delimiter_len = static_cast<int32_t>(end.size())};
}

Appended append_wait(const BudgetParams& params, BudgetState& state) {
  state.banned = true;
  state.waits_used += 1;
  state.thinking_tokens += static_cast<int32_t>(params.wait.size());
  if (params.wait.empty()) return {};
  state.tail_newline = params.format->is_newline(params.wait.back());
  return {.phrase = &params.wait};
}

bool wait_fits(const BudgetParams& params, const BudgetState& state) {
  return state.thinking_tokens + static_cast<int64_t>(params.wait.size()) < state.max_thinking;
}

Appended on_trigger(const BudgetParams& params, BudgetState& state) {
  const bool below_min = state.thinking_tokens < params.min_thinking;
  if (below_min || state.waits_used < params.num_waits) {
    if (wait_fits(params, state)) return append_wait(params, state);
    if (below_min && state.thinking_tokens < state.max_thinking) {
      state.banned = true;
      return {};
    }
  }
  return natural_end(params, state);
}

}  // namespace

Appended start_thinking(const BudgetParams& params, BudgetState& state) {
  if (state.phase != Phase::kThinking || state.thinking_tokens < state.max_thinking) return {};
  return force_end(params, state, false);
}

Appended advance(const BudgetParams& params, BudgetState& state, TokenId sampled) {
  if (state.phase != Phase::kThinking) return {.sampled = true};
  state.banned = false;
  if (params.format->is_trigger(sampled)) return on_trigger(params, state);
  if (state.thinking_tokens >= state.max_thinking) return force_end(params, state, false);
  Appended appended = append_sampled(params, state, sampled);
  if (state.thinking_tokens == state.max_thinking) return force_end(params, state, true);
  return appended;
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
