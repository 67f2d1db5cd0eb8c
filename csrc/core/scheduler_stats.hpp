// What a scheduler reports: counters, and the events of a step.

#pragma once

#include <utility>
#include <vector>

#include "types.hpp"

namespace s1 {

// Counters since the start, and the present state.
struct SchedulerStats {
  int64_t num_steps = 0;
  int64_t num_computed_tokens = 0;  // tokens that went through the model
  int64_t num_sampled_tokens = 0;
  int64_t num_forced_tokens = 0;
  int64_t num_preemptions = 0;
  int64_t num_drafts = 0;           // of one sequence in one step
  int64_t num_draft_tokens = 0;     // in them
  int64_t num_accepted_tokens = 0;  // of these, sampled as drafted
  int64_t num_undrafted = 0;        // sequences whose sampling or answer forbids drafts
  int64_t prefix_queries = 0;       // prompt tokens looked up
  int64_t prefix_hits = 0;          // prompt tokens found
  int32_t num_running = 0;
  int32_t num_waiting = 0;
  int32_t num_free_blocks = 0;
  int32_t num_pinned_blocks = 0;
  int32_t max_pinned_blocks = 0;
};

// What a step did, for the caller; cleared by the next step.
struct StepEvents {
  // Sequences that ended, and streamed ones that gained tokens, each with its row of the persistent
  // batch during the step. Ended ones wait for remove().
  std::vector<std::pair<SeqId, int32_t>> outputs;
  std::vector<SeqId> finished;  // of these, the ones that ended
  // Branches and their parents, also of an add(). They are scheduled like any sequence; the prefix
  // cache gives them what their parent has computed.
  std::vector<std::pair<SeqId, SeqId>> forked;
  // Appended tokens, forced ones included, and the row of each. ~token: it was dropped again.
  std::vector<int32_t> appended_req_indices;
  std::vector<TokenId> appended_tokens;

  void clear() {
    outputs.clear();
    finished.clear();
    forked.clear();
    appended_req_indices.clear();
    appended_tokens.clear();
  }
};

}  // namespace s1
