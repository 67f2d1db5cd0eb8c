// One stream of tokens on its way through the engine: its tokens, its KV blocks, its budget.
//
//   tokens   | prompt ............ | generated ................... |
//            0              prompt_len                      num_tokens
//   KV cache | valid ......................... |  pending  |
//            0                            num_computed  num_tokens
//
// There is no prefill or decode state: one pending token is a decode, more are an extend.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "budget.hpp"
#include "drafter.hpp"
#include "loop_detector.hpp"
#include "types.hpp"

namespace s1 {

// Tokens with which admission reckons for the answer of a sequence that thinks.
constexpr int32_t kUsualAnswer = 1024;

// A smaller maximum, at which a child of the sequence is forced to answer while it thinks on.
struct Checkpoint {
  int32_t max_thinking = 0;
  SeqId id = 0;  // of the child
};

// When drafts may be made for a sequence: never where what is sampled depends on the tokens before
// it by more than the model.
enum class Drafting : uint8_t { kNever, kThinking, kAlways };

// What a caller hands in. Copied into the sequence.
struct SequenceSpec {
  SeqId id = 0;
  std::vector<TokenId> prompt;
  int32_t max_len = 0;               // prompt and output together
  int32_t priority = 0;              // lower runs first
  int64_t order = 0;                 // lower runs first among those of one priority
  std::vector<TokenId> stop_tokens;  // end the answer when sampled
  bool stream_output = false;        // report every step with new tokens, not only the end
  Salt salt{};
  BudgetParams budget;
  int32_t thinking_tokens = -1;         // already in the prompt; -1: the sequence does not think
  int32_t max_thinking = 0;             // effective maximum, those in the prompt included
  std::vector<Checkpoint> checkpoints;  // ascending, all below max_thinking
  int32_t loop_repeats = 0;  // thinking ends when a phrase stands so often in a row; 0: never
  Drafting drafting = Drafting::kAlways;
};

struct Sequence {
  SeqId id = 0;
  int32_t priority = 0;
  int64_t order = 0;
  int64_t arrival = 0;          // counts add(), breaks ties of order; a child has its parent's
  std::vector<TokenId> tokens;  // prompt, then generated
  std::vector<uint8_t> marks;   // Mark of each generated token
  std::vector<TokenId> stop_tokens;
  std::vector<BlockId> blocks;  // logical block i -> physical block
  int32_t prompt_len = 0;
  int32_t max_len = 0;
  int32_t num_computed = 0;         // tokens whose K and V are in the cache
  int32_t num_registered = 0;       // leading blocks that stand in the prefix cache
  uint64_t chain = 0;               // content id of the last registered block, 0 at the root
  int32_t num_cached = -1;          // prompt tokens found in the cache at first admission
  uint64_t admission = 0;           // new each time it gets blocks, so (admission, i) names one
  int32_t req_index = kNoReqIndex;  // index of its sampling state while it runs
  int32_t num_taken = 0;            // generated tokens already handed to the caller
  FinishReason finish_reason = FinishReason::kNone;
  bool running = false;
  bool stream_output = false;
  Salt salt{};
  BudgetParams budget;
  BudgetState thinking;
  std::vector<Checkpoint> checkpoints;  // not reached yet, ascending
  int32_t loop_repeats = 0;
  std::unique_ptr<LoopDetector> loop;  // if loop_repeats > 0
  Drafting drafting = Drafting::kAlways;
  std::unique_ptr<Drafter> drafter;  // from its first draft on

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_pending() const { return num_tokens() - num_computed; }
  int32_t num_generated() const { return num_tokens() - prompt_len; }
  // Tokens that it may still add: as many as its budget leaves to think, and an answer.
  int32_t growth() const {
    const int32_t room = max_len - num_tokens();
    if (thinking.phase != Phase::kThinking) return room;
    const int32_t left = thinking.max_thinking - thinking.thinking_tokens;
    return std::min(room, std::max(left, 0) + kUsualAnswer);
  }
  bool finished() const { return finish_reason != FinishReason::kNone; }

  // Runs before `other`?
  bool precedes(const Sequence& other) const {
    if (priority != other.priority) return priority < other.priority;
    if (order != other.order) return order < other.order;
    return arrival != other.arrival ? arrival < other.arrival : id < other.id;
  }

  void append(TokenId token, uint8_t mark) {
    tokens.push_back(token);
    marks.push_back(mark);
  }
};

}  // namespace s1
