// The bounds of a scheduler; they hold from its construction on.

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
  int32_t max_len = 0;        // longest sequence; 0: any that fits, and nothing can be pinned
  int32_t max_window = 0;     // largest sliding window if every layer has one; 0: keep all blocks
  double min_reserve = 0.05;  // least share of GrowthReserve
  int32_t max_draft = 0;      // draft tokens of one sequence in one step; 0: no drafts
  int32_t max_samples = 0;    // of a step; 0: max_num_seqs
  std::vector<std::pair<int32_t, double>> step_costs;  // (tokens, time), see StepCost
  double max_step_time = 0.0;  // of ChunkPlanner; 0: chunks are as large as the step allows
  double max_run_time = 0.0;   // of RunLength; 0: runs are as long as the device batch allows
};

}  // namespace s1
