// The batch of a multi-step decode: all that a device needs to take decode steps by itself, budgets
// included.
//
// A row is a sequence: its budget state and parameters, and the inputs of its next step. The device
// advances the state by the table of budget.hpp. Owns no memory, and knows the layout only:
// multi_step_run.hpp decides what runs.

#pragma once

#include <span>

#include "sequence.hpp"

namespace s1 {

// Fields of a row, in this order.
enum RowField : int32_t {
  // state, which the device advances; `pending` and `remaining` describe a phrase that is fed one
  // token a step
  kPhase,
  kBanned,
  kTailNewline,
  kThinkingTokens,
  kMaxThinking,
  kWaitsUsed,
  kMatch,
  kHeld,
  kStarts,
  kPending,
  kRemaining,
  kInput,
  kPosition,
  kFinish,
  // parameters; phrases and stop tokens are a begin and a length in `phrases`
  kMinThinking,
  kNumWaits,
  kWaitBegin,
  kWaitLen,
  kWaitNewline,
  kNaturalBegin,
  kNaturalLen,
  kAfterMarkerBegin,
  kAfterMarkerLen,
  kForcedBegin,  // the newline, then the forced end
  kNewlineLen,
  kForcedLen,
  kNewlineAlways,
  kMaxLen,
  kStopBegin,
  kStopLen,
  // inputs of the next step
  kInputIds,
  kPositions,
  kContextLens,
  kSampleBanned,
  kNumRowFields
};

constexpr std::array<const char*, kNumRowFields> kRowFieldNames = {"phase",
                                                                   "banned",
                                                                   "tail_newline",
                                                                   "thinking_tokens",
                                                                   "max_thinking",
                                                                   "waits_used",
                                                                   "match",
                                                                   "held",
                                                                   "starts",
                                                                   "pending",
                                                                   "remaining",
                                                                   "input",
                                                                   "position",
                                                                   "finish",
                                                                   "min_thinking",
                                                                   "num_waits",
                                                                   "wait_begin",
                                                                   "wait_len",
                                                                   "wait_newline",
                                                                   "natural_begin",
                                                                   "natural_len",
                                                                   "after_marker_begin",
                                                                   "after_marker_len",
                                                                   "forced_begin",
                                                                   "newline_len",
                                                                   "forced_len",
                                                                   "newline_always",
                                                                   "max_len",
                                                                   "stop_begin",
                                                                   "stop_len",
                                                                   "input_ids",
                                                                   "positions",
                                                                   "context_lens",
                                                                   "sample_banned"};

// In the output tokens: this step sampled nothing for the row, because a phrase was being fed or
// the row had finished.
constexpr TokenId kNoToken = -1;

// Buffers that the caller owns, for B rows.
struct DeviceBatch {
  int32_t num_rows = 0;                 // B
  int32_t max_phrases = 0;              // capacity of `phrases`, tokens
  int64_t null_slot = 0;                // KV slot that finished rows write to
  int32_t* fields = nullptr;            // [kNumRowFields, B]
  int64_t* slot_mapping = nullptr;      // [B]
  int64_t* sample_positions = nullptr;  // [B]
  int32_t* phrases = nullptr;           // [max_phrases]

  int32_t num_phrases = 0;  // tokens written

  // Marks every row as finished and forgets all phrases.
  void clear();

  // Writes the next step of `sequence` and all that the steps after it need. Returns false, and
  // writes nothing, if `phrases` is too small.
  bool write_row(int32_t row, const Sequence& sequence, int32_t block_size);

 private:
  int32_t& at(RowField field, int32_t row) { return fields[field * num_rows + row]; }
  void write_state(int32_t row, const Sequence& sequence);
  void write_params(int32_t row, const Sequence& sequence);
  void write_inputs(int32_t row, const Sequence& sequence, int32_t block_size);
  int32_t add_phrase(std::span<const TokenId> tokens);
  void write_phrase(int32_t row, RowField begin, RowField len, std::span<const TokenId> tokens);
};

}  // namespace s1
