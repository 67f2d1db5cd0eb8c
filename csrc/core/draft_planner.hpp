// Which draft tokens join a planned step, so that it samples several tokens of a sequence.
//
//   scheduled | pending ......... | draft ......... |      each sampled position decides about one
//   sampled                       s0  s1  s2 ... sd        more token; s0 is what a step without
//                                                          the draft would have sampled
//
// s0 always counts. s1 was computed after the first draft token, so it counts if s0 equals that
// token and the budget only appended it; and so on. Sampling depends on the logits and the position
// alone, so the tokens are those of single steps, however good the draft was. KV after the last
// token that counts is overwritten when its positions are computed again.
//
// Owns what the choice is based on (step costs, the regret budget, acceptance statistics) and the
// proposals of the plan. Does not know blocks, or sequences beyond the rows that it is given.

#pragma once

#include <utility>
#include <vector>

#include "acceptance_stats.hpp"
#include "regret_budget.hpp"
#include "step_cost.hpp"
#include "step_plan.hpp"

namespace s1 {

class DraftPlanner {
 public:
  // `max_draft`: draft tokens of one sequence in one step; 0: no drafts. `step_costs`: points
  // (tokens, time) of StepCost.
  DraftPlanner(int32_t max_draft, int32_t max_rows, int32_t max_tokens,
               std::span<const std::pair<int32_t, double>> step_costs);

  // Chooses up to `limit` draft tokens for the rows of `plan` that sample: sets `draft` and
  // `num_drafted` where they make the step worth more than it costs.
  void choose(StepPlan& plan, int32_t limit);

  // Compares the `i`-th draft token of a row with the token sampled at its position. Records the
  // result and returns true if they are equal; false if there is no such draft token.
  bool verify(const PlannedRow& row, int32_t i, TokenId sampled);

  // Learns from the time of the finished step of `plan`.
  void record_step_time(const StepPlan& plan, double time);

 private:
  double step_time(const StepPlan& plan, int32_t drafted) const;
  int32_t affordable(const StepPlan& plan, int32_t limit) const;
  bool may_pay(const StepPlan& plan, int32_t samples, int32_t limit) const;
  void propose(PlannedRow& row);
  void keep_likeliest(StepPlan& plan, int32_t samples, int32_t limit);

  int32_t max_draft_;
  StepCost cost_;
  RegretBudget regret_;
  AcceptanceStats stats_;                            // of all sequences
  std::vector<DraftToken> proposals_;                // of the plan, by row; never reallocated
  std::vector<std::pair<double, int32_t>> ranking_;  // scratch: probability, row
};

}  // namespace s1
