#include "checkpoint_branches.hpp"

namespace s1 {

namespace {

BudgetState limited_state(const Sequence& parent, const Checkpoint& checkpoint) {
  BudgetState state = parent.thinking;
  limit_thinking(state, checkpoint.max_thinking, EndReason::kBudget);
  return state;
}

std::unique_ptr<Sequence> make_branch(const Sequence& parent, SeqId id, const BudgetState& state,
                                      TokenId sampled, const Appended& appended) {
  auto branch = std::make_unique<Sequence>();
  branch->id = id;
  branch->priority = parent.priority;
  branch->client = parent.client;
  branch->order = parent.order;
  branch->arrival = parent.arrival;
  branch->tokens.reserve(static_cast<size_t>(parent.max_len));
  branch->tokens = parent.tokens;
  branch->marks.reserve(static_cast<size_t>(parent.max_len - parent.prompt_len));
  branch->marks = parent.marks;
  branch->stop_tokens = parent.stop_tokens;
  branch->prompt_len = parent.prompt_len;
  branch->num_settled = parent.num_settled;
  branch->max_len = parent.max_len;
  branch->min_tokens = parent.min_tokens;
  branch->stream_output = true;
  branch->interactive = parent.interactive;
  branch->salt = parent.salt;
  branch->budget = parent.budget;
  branch->thinking = state;
  branch->drafting = parent.drafting;
  branch->loop_repeats = parent.loop_repeats;
  if (parent.loop != nullptr) branch->loop = std::make_unique<LoopDetector>(*parent.loop);
  branch->append_transition(sampled, kThink, appended);
  check_invariant(branch->num_tokens() < branch->max_len, "a checkpoint without room to answer");
  return branch;
}

}  // namespace

Branches branch_at_start(const Sequence& parent) {
  Branches branches;
  for (const Checkpoint& checkpoint : parent.checkpoints) {
    BudgetState state = limited_state(parent, checkpoint);
    const Appended appended = start_thinking(parent.budget, state);
    if (appended.phrase == nullptr) break;
    branches.push_back(make_branch(parent, checkpoint.id, state, 0, appended));
  }
  return branches;
}

Branches branch_before(const Sequence& parent, TokenId sampled) {
  Branches branches;
  BudgetState own = parent.thinking;
  const Appended own_appended = advance(parent.budget, own, sampled);
  for (const Checkpoint& checkpoint : parent.checkpoints) {
    BudgetState state = limited_state(parent, checkpoint);
    const Appended appended = advance(parent.budget, state, sampled);
    if (appended == own_appended && state.phase == own.phase &&
        state.waits_used == own.waits_used) {
      break;
    }
    branches.push_back(make_branch(parent, checkpoint.id, state, sampled, appended));
  }
  return branches;
}

}  // namespace s1
