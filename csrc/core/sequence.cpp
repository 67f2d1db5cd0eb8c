#include "sequence.hpp"

#include <algorithm>

namespace s1 {

Sequence::Sequence(const SequenceSpec& spec)
    : id(spec.id),
      priority(spec.priority),
      client(spec.client),
      order(spec.order),
      stop_tokens(spec.stop_tokens),
      prompt_len(static_cast<int32_t>(spec.prompt.size())),
      max_len(spec.max_len),
      min_tokens(spec.min_tokens),
      num_to_score(spec.num_to_score),
      stream_output(spec.stream_output),
      pin(spec.pin),
      interactive(spec.interactive),
      salt(spec.salt),
      budget(spec.budget),
      drafting(spec.drafting) {
  tokens.reserve(static_cast<size_t>(spec.max_len));
  tokens = spec.prompt;
  marks.reserve(static_cast<size_t>(std::max(spec.max_len - prompt_len, 0)));
  num_settled = prompt_len;
  if (spec.thinking_tokens < 0) return;
  if (budget.format == nullptr) throw std::invalid_argument("a thinking sequence needs a format");
  if (!budget.format->end_markers.empty() &&
      (budget.format->natural_end.empty() || budget.forced_end.empty())) {
    throw std::invalid_argument("end_markers need a natural and a forced end");
  }
  thinking.phase = Phase::kThinking;
  thinking.thinking_tokens = spec.thinking_tokens;
  thinking.max_thinking = spec.max_thinking;
  thinking.tail_newline = budget.format->is_newline(tokens.back());
  checkpoints = spec.checkpoints;
  loop_repeats = spec.loop_repeats;
  if (loop_repeats > 0) loop = std::make_unique<LoopDetector>();
}

int32_t Sequence::expected_growth() const {
  const int32_t limit = max_len - num_tokens();
  if (thinking.phase != Phase::kThinking) return limit;
  const int32_t remaining = thinking.max_thinking - thinking.thinking_tokens;
  return std::min(limit, std::max(remaining, 0) + kTypicalAnswerTokens);
}

bool Sequence::precedes(const Sequence& other) const {
  if (priority != other.priority) return priority < other.priority;
  if (order != other.order) return order < other.order;
  return arrival != other.arrival ? arrival < other.arrival : id < other.id;
}

bool Sequence::is_end(TokenId token) const {
  if (thinking.phase == Phase::kThinking) return budget.format->is_trigger(token);
  return std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end();
}

void Sequence::drop(int32_t count) {
  tokens.resize(tokens.size() - static_cast<size_t>(count));
  marks.resize(marks.size() - static_cast<size_t>(count));
  num_computed = std::min(num_computed, num_tokens());  // their KV slots are overwritten
}

void Sequence::append_transition(TokenId sampled, uint8_t region, const Appended& appended) {
  const auto append_one = [&](TokenId token, uint8_t mark) {
    if (num_tokens() == max_len) return;  // max_tokens holds only a part of the phrase
    append(token, mark);
    num_forced += (mark & kForced) != 0;
  };
  if (appended.dropped > 0) drop(appended.dropped);
  if (appended.sampled) append_one(sampled, region);
  std::fill_n(marks.rbegin(), appended.marker_len, uint8_t{kDelimiter});
  if (appended.newline) {
    for (TokenId token : budget.format->newline) append_one(token, kDelimiter | kForced);
  }
  if (appended.phrase != nullptr) {
    const bool is_wait = thinking.phase == Phase::kThinking;
    for (size_t i = 0; i < appended.phrase->size(); ++i) {
      const bool is_delimiter = static_cast<int32_t>(i) < appended.delimiter_len;
      const uint8_t mark = is_wait ? kThink : is_delimiter ? kDelimiter : kAnswer;
      append_one((*appended.phrase)[i], mark | kForced);
    }
  }
  settle();
}

// Tokens that are no longer held count for the loop detector.
void Sequence::settle() {
  const int32_t before = num_settled;
  num_settled = num_tokens() - thinking.held;
  if (loop == nullptr) return;
  for (int32_t i = before; i < num_settled; ++i) {
    if ((marks[static_cast<size_t>(i - prompt_len)] & kRegionMask) != kThink) continue;
    if (loop->push(std::span(tokens).first(static_cast<size_t>(i) + 1), loop_repeats)) {
      limit_thinking(thinking, budget.min_thinking, EndReason::kLoop);
    }
  }
}

}  // namespace s1
