#include "device_batch.hpp"

#include <algorithm>

namespace s1 {

namespace {

// Tokens after the one that the next step computes: the rest of a phrase.
std::span<const TokenId> pending_phrase(const Sequence& sequence) {
  return std::span(sequence.tokens).subspan(static_cast<size_t>(sequence.num_computed) + 1);
}

size_t phrase_tokens(const Sequence& sequence) {
  const size_t tokens = pending_phrase(sequence).size() + sequence.stop_tokens.size();
  if (sequence.thinking.phase != Phase::kThinking) return tokens;
  const BudgetParams& params = sequence.budget;
  return tokens + params.wait.size() + params.format->natural_end.size() +
         params.format->after_marker.size() + params.format->newline.size() +
         params.forced_end.size();
}

}  // namespace

void DeviceBatch::clear() {
  num_phrases = 0;
  std::fill_n(fields, static_cast<size_t>(kNumRowFields) * static_cast<size_t>(num_rows), 0);
  for (int32_t row = 0; row < num_rows; ++row) {
    at(kFinish, row) = static_cast<int32_t>(FinishReason::kStop);
    slot_mapping[row] = null_slot;
    sample_positions[row] = 1;
  }
}

bool DeviceBatch::write_row(int32_t row, const Sequence& sequence, int32_t block_size) {
  if (phrase_tokens(sequence) > static_cast<size_t>(max_phrases - num_phrases)) return false;
  write_state(row, sequence);
  write_params(row, sequence);
  write_inputs(row, sequence, block_size);
  return true;
}

int32_t DeviceBatch::add_phrase(std::span<const TokenId> tokens) {
  const int32_t begin = num_phrases;
  std::copy(tokens.begin(), tokens.end(), phrases + begin);
  num_phrases += static_cast<int32_t>(tokens.size());
  return begin;
}

void DeviceBatch::write_phrase(int32_t row, RowField begin, RowField len,
                               std::span<const TokenId> tokens) {
  at(begin, row) = add_phrase(tokens);
  at(len, row) = static_cast<int32_t>(tokens.size());
}

void DeviceBatch::write_state(int32_t row, const Sequence& sequence) {
  const BudgetState& state = sequence.thinking;
  at(kPhase, row) = static_cast<int32_t>(state.phase);
  at(kBanned, row) = state.banned;
  at(kTailNewline, row) = state.tail_newline;
  at(kThinkingTokens, row) = state.thinking_tokens;
  at(kMaxThinking, row) = state.max_thinking;
  at(kWaitsUsed, row) = state.waits_used;
  at(kMatch, row) = state.match;
  at(kHeld, row) = state.held;
  at(kStarts, row) = static_cast<int32_t>(state.starts);
  write_phrase(row, kPending, kRemaining, pending_phrase(sequence));
  at(kInput, row) = sequence.tokens[static_cast<size_t>(sequence.num_computed)];
  at(kPosition, row) = sequence.num_computed;
  at(kFinish, row) = 0;
}

void DeviceBatch::write_params(int32_t row, const Sequence& sequence) {
  at(kMaxLen, row) = sequence.max_len;
  write_phrase(row, kStopBegin, kStopLen, sequence.stop_tokens);
  if (sequence.thinking.phase != Phase::kThinking) return;
  const BudgetParams& params = sequence.budget;
  const BudgetFormat& format = *params.format;
  at(kMinThinking, row) = params.min_thinking;
  at(kNumWaits, row) = params.num_waits;
  write_phrase(row, kWaitBegin, kWaitLen, params.wait);
  at(kWaitNewline, row) = !params.wait.empty() && format.is_newline(params.wait.back());
  write_phrase(row, kNaturalBegin, kNaturalLen, format.natural_end);
  write_phrase(row, kAfterMarkerBegin, kAfterMarkerLen, format.after_marker);
  write_phrase(row, kForcedBegin, kNewlineLen, format.newline);
  add_phrase(params.forced_end);  // directly after the newline
  at(kForcedLen, row) = static_cast<int32_t>(params.forced_end.size());
  at(kNewlineAlways, row) = format.newline_always;
}

void DeviceBatch::write_inputs(int32_t row, const Sequence& sequence, int32_t block_size) {
  const int32_t position = sequence.num_computed;
  const auto block =
      static_cast<int64_t>(sequence.blocks[static_cast<size_t>(position / block_size)]);
  at(kInputIds, row) = at(kInput, row);
  at(kPositions, row) = position;
  at(kContextLens, row) = position + 1;
  at(kSampleBanned, row) = ban_code(sequence.budget, sequence.thinking);
  slot_mapping[row] = block * block_size + position % block_size;
  sample_positions[row] = position + 1;
}

}  // namespace s1
