#include "draft_planner.hpp"

#include <algorithm>
#include <bit>

namespace s1 {

namespace {

constexpr double kMinGain = 1.05;          // in tokens per time, to be worth drafts
constexpr double kMinProbability = 0.05;   // a draft token less likely pays in no step
constexpr double kBestProbability = 0.95;  // assumed of the best draft tokens

// Tokens that may be drafted so that every sampled position still decides about a plain token: none
// after the last token of the thinking or of the sequence.
int32_t draft_limit(const Sequence& sequence) {
  const int32_t limit = sequence.max_len - sequence.num_tokens() - 1;
  const BudgetState& state = sequence.thinking;
  if (state.phase != Phase::kThinking) {
    return sequence.drafting == Drafting::kAlways ? limit : 0;
  }
  if (sequence.drafting == Drafting::kNever) return 0;
  return std::min(limit, state.max_thinking - state.thinking_tokens - state.held - 1);
}

// The draft tokens of a step come in few sizes (all up to 8, then 12, 16, 24, ...), because a
// runner may have to prepare for each size of step.
bool is_step_size(int32_t drafted) {
  if (drafted <= 8) return true;
  const int32_t odd = drafted >> std::countr_zero(static_cast<uint32_t>(drafted));
  return odd == 1 || odd == 3;
}

}  // namespace

DraftPlanner::DraftPlanner(int32_t max_draft, int32_t max_rows, int32_t max_tokens,
                           std::span<const std::pair<int32_t, double>> step_costs)
    : max_draft_(std::clamp(max_draft, 0, max_tokens)),
      cost_(step_costs, max_tokens),
      regret_(cost_.estimate(1, 1, 0)) {
  proposals_.reserve(static_cast<size_t>(max_draft_) * static_cast<size_t>(max_rows));
}

void DraftPlanner::choose(StepPlan& plan, int32_t limit) {
  const int32_t samples = plan.num_samples();
  if (max_draft_ == 0 || samples == 0) return;
  limit = affordable(plan, limit);
  if (!may_pay(plan, samples, limit)) return;
  proposals_.clear();
  for (PlannedRow& row : plan.rows) {
    if (row.num_samples > 0) propose(row);
  }
  keep_likeliest(plan, samples, limit);
}

// Estimated time of the planned step with `drafted` draft tokens.
double DraftPlanner::step_time(const StepPlan& plan, int32_t drafted) const {
  return cost_.estimate(plan.num_rows(), plan.num_tokens + drafted, drafted);
}

// Largest number of draft tokens, up to `limit`, that may all be rejected.
int32_t DraftPlanner::affordable(const StepPlan& plan, int32_t limit) const {
  const double plain = step_time(plan, 0);
  while (limit > 0 && !regret_.covers(step_time(plan, limit) - plain)) --limit;
  return limit;
}

// True if the step could be better with drafts of the best probability.
bool DraftPlanner::may_pay(const StepPlan& plan, int32_t samples, int32_t limit) const {
  const double plain_rate = samples / step_time(plan, 0);
  for (int32_t drafted = 1; drafted <= limit; ++drafted) {
    const double rate = (samples + kBestProbability * drafted) / step_time(plan, drafted);
    if (rate > kMinGain * plain_rate) return true;
  }
  return false;
}

// Proposes a draft for the row, up to the first token that would end the sequence or its thinking.
void DraftPlanner::propose(PlannedRow& row) {
  Sequence& sequence = *row.sequence;
  const int32_t limit = std::min(draft_limit(sequence), max_draft_);
  if (limit <= 0) return;
  if (sequence.drafter == nullptr) sequence.drafter = std::make_unique<Drafter>(stats_.as_prior());
  const size_t first = proposals_.size();
  sequence.drafter->propose(sequence.tokens, sequence.num_settled, limit, kMinProbability,
                            proposals_);
  const auto draft = std::span<const DraftToken>(proposals_).subspan(first);
  const auto end = std::find_if(draft.begin(), draft.end(), [&](const DraftToken& draft_token) {
    return sequence.is_end(draft_token.token);
  });
  row.draft = draft.first(static_cast<size_t>(end - draft.begin()));
}

// Keeps as many of the likeliest draft tokens as make the step yield the most tokens per time. A
// draft token is never likelier than the one before it, so whole heads of drafts are kept.
void DraftPlanner::keep_likeliest(StepPlan& plan, int32_t samples, int32_t limit) {
  ranking_.clear();
  for (int32_t row = 0; row < plan.num_rows(); ++row) {
    for (const DraftToken& draft_token : plan.rows[static_cast<size_t>(row)].draft) {
      ranking_.emplace_back(draft_token.probability, row);
    }
  }
  const auto likelier = [](const auto& a, const auto& b) { return a.first > b.first; };
  std::stable_sort(ranking_.begin(), ranking_.end(), likelier);
  const auto count = std::min(ranking_.size(), static_cast<size_t>(limit));
  double yield = samples;
  double best_rate = kMinGain * samples / step_time(plan, 0);
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    yield += ranking_[i].first;
    const auto drafted = static_cast<int32_t>(i) + 1;
    if (!is_step_size(drafted)) continue;
    const double rate = yield / step_time(plan, drafted);
    if (rate <= best_rate) continue;
    best_rate = rate;
    kept = i + 1;
  }
  for (size_t i = 0; i < kept; ++i) {
    ++plan.rows[static_cast<size_t>(ranking_[i].second)].num_drafted;
  }
}

bool DraftPlanner::verify(const PlannedRow& row, int32_t i, TokenId sampled) {
  if (static_cast<size_t>(i) >= row.draft.size()) return false;
  const DraftToken& draft_token = row.draft[static_cast<size_t>(i)];
  const bool accepted = draft_token.token == sampled;
  row.sequence->drafter->record(draft_token.bucket, accepted);
  stats_.record(draft_token.bucket, accepted);
  return accepted;
}

void DraftPlanner::record_step_time(const StepPlan& plan, double time) {
  if (plan.rows.empty() || !cost_.learns()) return;
  int32_t drafted = 0, accepted = 0, samples = 0;
  for (const PlannedRow& row : plan.rows) {
    drafted += row.num_drafted;
    accepted += row.num_accepted;
    samples += row.num_samples - row.num_drafted;
  }
  const double plain = cost_.estimate(plan.num_rows(), plan.num_tokens - drafted, 0);
  double lost = cost_.estimate(plan.num_rows(), plan.num_tokens, drafted) - plain;
  if (plan.num_rows() + drafted == plan.num_tokens) {  // only steps without extends are comparable
    lost = time - plain;
    cost_.record(plan.num_rows(), plan.num_tokens, drafted, time);
  }
  const double saved =
      samples == 0 ? 0.0 : cost_.estimate(samples, samples, 0) * accepted / samples;
  regret_.record_step(time, plain, drafted > 0 ? saved - lost : 0.0);
}

}  // namespace s1
