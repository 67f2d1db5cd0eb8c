// A run: decode steps that a device takes by itself, budgets included, while the host is behind.
//
// The scheduler writes what the device has to know of each sequence (a lane), and afterwards
// replays the sampled tokens through its own state machine, which remains the definition. What the
// host decides meanwhile (a limit, an abort, a stop string) takes a sequence off its lane: what the
// device goes on to sample there is dropped.

#pragma once

#include "types.hpp"

namespace s1 {

// Fields of a lane, in this order.
enum RowField : int32_t {
  // state, which the device advances; `pending` and `remaining` are a phrase being fed
  kPhase,
  kBanned,
  kTailNewline,
  kThinkingTokens,
  kMaxThinking,
  kWaitsUsed,
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

constexpr std::array<const char*, kNumRowFields> kRowFieldNames = {
    "phase",        "banned",         "tail_newline", "thinking_tokens", "max_thinking",
    "waits_used",   "pending",        "remaining",    "input",           "position",
    "finish",       "min_thinking",   "num_waits",    "wait_begin",      "wait_len",
    "wait_newline", "natural_begin",  "natural_len",  "forced_begin",    "newline_len",
    "forced_len",   "newline_always", "max_len",      "stop_begin",      "stop_len",
    "input_ids",    "positions",      "context_lens", "sample_banned"};

// In a run's tokens: nothing was decided here, a phrase was being fed or the lane had finished.
constexpr TokenId kNoToken = -1;

// Buffers that the caller owns, for B lanes; those beyond the run's sequences have finished.
struct DeviceBatch {
  int32_t rows = 0;                     // B
  int32_t max_phrases = 0;              // capacity of `phrases`, tokens
  int64_t null_slot = 0;                // where lanes that have finished write
  int32_t* lanes = nullptr;             // [kNumRowFields, B]
  int64_t* slot_mapping = nullptr;      // [B]
  int64_t* sample_positions = nullptr;  // [B]
  int32_t* phrases = nullptr;

  int32_t num_phrases = 0;  // tokens written

  int32_t& at(RowField field, int32_t lane) { return lanes[field * rows + lane]; }
};

}  // namespace s1
