// What goes into a scheduler, and what it reports besides the tokens.

#pragma once

#include <utility>
#include <vector>

#include "types.hpp"

namespace s1 {

struct SchedulerConfig {
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t max_num_seqs = 0;            // rows of a step and of the persistent batch
  int32_t max_num_batched_tokens = 0;  // tokens of a step, at least max_num_seqs
  bool enable_prefix_caching = true;
  double min_reserve = 0.05;  // least share of GrowthReserve
  int32_t max_draft = 0;      // draft tokens of one sequence in one step; 0: no drafts
  int32_t max_samples = 0;    // of a step; 0: max_num_seqs
  std::vector<std::pair<int32_t, double>> step_costs;  // (tokens, time), see StepCost
};

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
  // Appended tokens, forced ones included, and the row of each.
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
