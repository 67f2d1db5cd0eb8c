// How answers at checkpoints come off a thinking sequence: as children, sequences of their own that
// are what it would be under a smaller maximum. Decides by the budget's own transitions alone.

#include "scheduler.hpp"

namespace s1 {

namespace {

void limit_budget(BudgetState& state, const Checkpoint& checkpoint) {
  limit_thinking(state, checkpoint.max_thinking, EndReason::kBudget);
}

}  // namespace

// A checkpoint that the thinking in the prompt has used up answers at once.
void Scheduler::fork_at_start(Sequence& parent) {
  while (!parent.checkpoints.empty()) {
    BudgetState state = parent.thinking;
    limit_budget(state, parent.checkpoints.front());
    const Appended appended = start(parent.budget, state);
    if (appended.phrase == nullptr) return;
    fork(parent, parent.checkpoints.front(), state, 0, appended);
    parent.checkpoints.erase(parent.checkpoints.begin());
  }
}

// A child is what the sequence would be under the checkpoint's maximum. As long as both would do
// the same they are one; a larger maximum never parts before a smaller one.
void Scheduler::fork_where_budgets_part(Sequence& parent, TokenId sampled) {
  BudgetState mine = parent.thinking;
  const Appended own = advance(parent.budget, mine, sampled);
  while (!parent.checkpoints.empty()) {
    BudgetState state = parent.thinking;
    limit_budget(state, parent.checkpoints.front());
    const Appended appended = advance(parent.budget, state, sampled);
    if (appended == own && state.phase == mine.phase && state.waits_used == mine.waits_used) return;
    fork(parent, parent.checkpoints.front(), state, sampled, appended);
    parent.checkpoints.erase(parent.checkpoints.begin());
  }
}

void Scheduler::fork(const Sequence& parent, const Checkpoint& checkpoint, const BudgetState& state,
                     TokenId sampled, const Appended& appended) {
  if (sequences_.contains(checkpoint.id)) throw std::invalid_argument("sequence id is taken");
  auto child = std::make_unique<Sequence>();
  child->id = checkpoint.id;
  child->priority = parent.priority;
  child->order = parent.order;
  child->arrival = parent.arrival;
  child->tokens = parent.tokens;
  child->marks = parent.marks;
  child->stop_tokens = parent.stop_tokens;
  child->prompt_len = parent.prompt_len;
  child->max_len = parent.max_len;
  child->stream_output = true;
  child->salt = parent.salt;
  child->budget = parent.budget;
  child->thinking = state;
  child->drafting = parent.drafting;
  child->loop_repeats = parent.loop_repeats;
  if (parent.loop != nullptr) child->loop = std::make_unique<LoopDetector>(*parent.loop);
  append(*child, sampled, kThink, appended);
  check(child->num_tokens() < child->max_len, "a checkpoint without room to answer");
  forked_.emplace_back(child->id, parent.id);
  waiting_.insert(child.get());
  has_news_ = true;
  sequences_.emplace(checkpoint.id, std::move(child));
}

}  // namespace s1
