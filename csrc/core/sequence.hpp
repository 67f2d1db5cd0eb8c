// One stream of tokens on its way through the engine: its tokens, its KV blocks, its budget.
//
//   tokens   | prompt ............ | generated ................... |
//            0              prompt_len                      num_tokens
//   KV cache | valid ......................... |  pending  |
//            0                            num_computed  num_tokens
//
// There is no prefill or decode state: one pending token is a decode, more are an extend. The last
// tokens may be held (budget.hpp): computed like others, but perhaps dropped later. Nothing that
// outlasts a step may depend on them: output, prefix cache, index of drafts, loop detector.
// Knows its own tokens and budget only: scheduling, blocks and branches are decided elsewhere.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "budget.hpp"
#include "drafter.hpp"
#include "loop_detector.hpp"
#include "types.hpp"

namespace s1 {

// Tokens that admission expects as the answer of a sequence that thinks.
constexpr int32_t kTypicalAnswerTokens = 1024;

// A smaller maximum, at which a branch of the sequence answers while the sequence thinks on.
struct Checkpoint {
  int32_t max_thinking = 0;
  SeqId id = 0;  // of the branch
};

// When tokens may be drafted for a sequence. Drafts are forbidden where sampling depends on earlier
// tokens in other ways than through the model (penalties, grammars).
enum class Drafting : uint8_t { kNever, kThinking, kAlways };

// What a caller passes to Scheduler::add(). Copied into the sequence.
struct SequenceSpec {
  SeqId id = 0;
  std::vector<TokenId> prompt;
  int32_t max_len = 0;               // prompt and output together
  int32_t min_tokens = 0;            // generated before a stop token may be sampled
  int32_t priority = 0;              // lower runs first, and preempts higher numbers
  int64_t client = 0;                // that shares the engine fairly with others
  int64_t order = 0;                 // lower runs first within a priority of a client
  std::vector<TokenId> stop_tokens;  // end the answer when sampled
  bool stream_output = false;        // report every step with new tokens, not only the end
  bool interactive = false;          // a reader or a deadline waits for its tokens
  bool pin = false;          // once max_len is reached, its full blocks are pinned under its id
  int32_t num_to_score = 0;  // leading prompt tokens whose logits are wanted, for the token after
  Salt salt{};
  BudgetParams budget;
  int32_t thinking_tokens = -1;         // already in the prompt; -1: the sequence does not think
  int32_t max_thinking = 0;             // effective maximum, tokens in the prompt included
  std::vector<Checkpoint> checkpoints;  // ascending, all below max_thinking
  int32_t loop_repeats = 0;  // thinking ends when a phrase repeats so often in a row; 0: never
  Drafting drafting = Drafting::kAlways;
};

struct ClientShare;  // fair_queue.hpp

struct Sequence {
  SeqId id = 0;
  int32_t priority = 0;
  int64_t client = 0;
  ClientShare* share = nullptr;  // of the client
  int64_t order = 0;
  int64_t arrival = 0;  // counts add() calls, breaks ties of order; a branch has its parent's
  std::vector<TokenId> tokens;  // prompt, then generated; has room for max_len
  std::vector<uint8_t> marks;   // Mark of each generated token; has room for max_len - prompt_len
  std::vector<TokenId> stop_tokens;
  std::vector<BlockId> blocks;  // logical block i -> physical block; expired: the null block
  int32_t prompt_len = 0;
  int32_t max_len = 0;
  int32_t min_tokens = 0;           // generated before a stop token may be sampled
  int32_t num_settled = 0;          // leading tokens that are not held
  int32_t num_computed = 0;         // tokens whose K and V are in the cache
  int32_t num_to_score = 0;         // leading tokens whose logits score the token after them
  int32_t num_scored = 0;           // of these, those that were scored: never again
  int32_t num_charged = 0;          // leading tokens that its client was charged for, or got free
  int32_t num_expired_blocks = 0;   // leading blocks that were freed (sliding_window.hpp)
  int32_t num_hashed_blocks = 0;    // leading blocks that are in the prefix cache
  uint64_t parent_hash = 0;         // block_hash of the last of these, 0 if there is none
  int32_t num_cached = -1;          // prompt tokens found in the cache at first admission
  uint64_t admission = 0;           // new at each admission, so (admission, i) identifies a block
  int32_t req_index = kNoReqIndex;  // row of the persistent batch while it runs
  int32_t num_collected = 0;        // generated tokens that the caller has collected
  int32_t num_forced = 0;           // forced tokens appended to this sequence itself
  FinishReason finish_reason = FinishReason::kNone;
  bool running = false;
  bool stream_output = false;
  bool pin = false;  // its blocks never expire, because they are to be pinned
  bool interactive = false;
  int32_t num_displaced = 0;  // times that it made room for a higher priority
  Salt salt{};
  BudgetParams budget;
  BudgetState thinking;
  std::vector<Checkpoint> checkpoints;  // not reached yet, ascending
  int32_t loop_repeats = 0;
  std::unique_ptr<LoopDetector> loop;  // if loop_repeats > 0
  Drafting drafting = Drafting::kAlways;
  std::unique_ptr<Drafter> drafter;  // created for its first draft

  Sequence() = default;
  // Copies the spec; nothing is appended yet. Throws std::invalid_argument if a sequence that
  // thinks has no format.
  explicit Sequence(const SequenceSpec& spec);

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_pending() const { return num_tokens() - num_computed; }
  // Position of the earliest query that may come: the next one, or the one before held tokens,
  // which is computed again if they are dropped and nothing takes their place.
  int32_t earliest_query() const { return std::min(num_computed, num_settled - 1); }
  int32_t num_generated() const { return num_tokens() - prompt_len; }
  int32_t num_held_blocks() const {
    return static_cast<int32_t>(blocks.size()) - num_expired_blocks;
  }
  bool finished() const { return finish_reason != FinishReason::kNone; }
  // True if no stop token may be sampled after `ahead` more tokens, should it not think then.
  bool bans_ends(int32_t ahead = 0) const {
    return num_generated() + ahead < min_tokens && !stop_tokens.empty();
  }

  // Tokens that it is expected to add at most: its remaining thinking budget and a typical answer.
  int32_t expected_growth() const;

  // True if it is scheduled before `other` of the same client.
  bool precedes(const Sequence& other) const;

  // True if sampling `token` ends the sequence, or ends its thinking.
  bool is_end(TokenId token) const;

  void append(TokenId token, uint8_t mark) {
    tokens.push_back(token);
    marks.push_back(mark);
  }

  // Applies the tokens of one budget transition, up to max_len; `region` marks the sampled one. A
  // loop in the thinking lowers its maximum, though not below the minimum.
  void append_transition(TokenId sampled, uint8_t region, const Appended& appended);

  // Drops the last tokens, which are held.
  void drop(int32_t count);

 private:
  void settle();
};

}  // namespace s1
