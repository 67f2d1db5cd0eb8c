// The plan of one step: which tokens of which sequences are computed and sampled. Between
// Scheduler::schedule() and the end of the step.

#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "drafter.hpp"
#include "sequence.hpp"

namespace s1 {

struct PlannedRow {
  Sequence* sequence;
  int32_t context;        // tokens computed before the step
  int32_t num_scheduled;  // pending tokens that are computed
  int32_t num_samples;    // after the last pending token and after each computed draft
                          // token; 0: the last pending token is not scheduled yet, or is the
                          // last one of max_len
  std::span<const DraftToken> draft{};  // proposed; the planner owns them
  int32_t num_drafted = 0;              // leading draft tokens that are computed
  int32_t num_accepted = 0;             // of these, equal to what was sampled

  int32_t num_tokens() const { return num_scheduled + num_drafted; }
};

struct StepPlan {
  std::vector<PlannedRow> rows;
  std::vector<SeqId> admitted;             // sequences that entered the persistent batch
  std::vector<const Sequence*> displaced;  // sequences that made room for a waiting one
  int32_t num_tokens = 0;
  bool preempted = false;  // some sequence lost its blocks to this plan

  int32_t num_rows() const { return static_cast<int32_t>(rows.size()); }

  int32_t num_samples() const {
    int32_t samples = 0;
    for (const PlannedRow& row : rows) samples += row.num_samples;
    return samples;
  }

  // Rows of one token come first: a kernel of their own attends for them.
  void put_decode_rows_first() {
    const auto decodes = [](const PlannedRow& row) { return row.num_tokens() == 1; };
    if (!std::is_partitioned(rows.begin(), rows.end(), decodes)) {
      std::stable_partition(rows.begin(), rows.end(), decodes);
    }
  }

  void clear() {
    rows.clear();
    admitted.clear();
    num_tokens = 0;
    preempted = false;
    displaced.clear();
  }
};

}  // namespace s1
