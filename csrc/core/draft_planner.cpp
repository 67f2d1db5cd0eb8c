// How drafts join a plan, and how they leave it: several tokens of a sequence sampled in one step.
//
//   scheduled | pending ......... | draft ......... |      each sampled position decides about one
//   sampled                       s0  s1  s2 ... sd        more token; s0 is what a step without
//                                                          the draft would have sampled
//
// s0 counts in any case. s1 was computed behind the first drafted token, so it counts if s0 is that
// token and the budget did nothing but append it; and so on. What is sampled depends on the logits
// and the position alone, so the tokens are those of single steps, however good the draft was. KV
// behind the last token that counts is overwritten when its positions come up again.

#include <algorithm>
#include <bit>

#include "scheduler.hpp"

namespace s1 {

namespace {

constexpr double kMargin = 1.05;  // a step must promise so much more to be worth a draft
constexpr double kLeast = 0.05;   // no step is so cheap that a guess less likely pays
constexpr double kSurest = 0.95;  // what the best guesses are hoped to reach

// Tokens that may be drafted so that every sampled position can still decide about a plain token:
// none behind the last token of the thinking or of the sequence.
int32_t draft_limit(const Sequence& sequence) {
  const int32_t room = sequence.max_len - sequence.num_tokens() - 1;
  const BudgetState& state = sequence.thinking;
  if (state.phase != Phase::kThinking) {
    return sequence.drafting == Drafting::kAlways ? room : 0;
  }
  if (sequence.drafting == Drafting::kNever) return 0;
  return std::min(room, state.max_thinking - state.thinking_tokens - 1);
}

// Drafts of all rows together come in few sizes, all up to 8, then 12, 16, 24, ...: what a runner
// prepares for a size of step, it prepares seldom.
bool is_size(int32_t drafted) {
  if (drafted <= 8) return true;
  const int32_t odd = drafted >> std::countr_zero(static_cast<uint32_t>(drafted));
  return odd == 1 || odd == 3;
}

// Does a token end what is drafted, so that nothing can be said about what follows it?
bool ends_draft(const Sequence& sequence, TokenId token) {
  if (sequence.thinking.phase == Phase::kThinking) return sequence.budget.format->is_trigger(token);
  const std::vector<TokenId>& stops = sequence.stop_tokens;
  return std::find(stops.begin(), stops.end(), token) != stops.end();
}

}  // namespace

// What the planned step takes with so many drafted tokens more.
double Scheduler::cost_of_step(int32_t drafted) const {
  return cost_.of(static_cast<int32_t>(rows_.size()), planned_tokens_ + drafted, drafted);
}

void Scheduler::record_step_time(double time) {
  if (rows_.empty() || !cost_.learns()) return;
  const auto rows = static_cast<int32_t>(rows_.size());
  int32_t drafted = 0, accepted = 0, samples = 0;
  for (const Row& row : rows_) {
    drafted += row.num_drafted;
    accepted += row.num_accepted;
    samples += row.samples - row.num_drafted;
  }
  const double plain = cost_.of(rows, planned_tokens_ - drafted, 0);
  double lost = cost_.of(rows, planned_tokens_, drafted) - plain;
  if (rows + drafted == planned_tokens_) {  // steps that extend say nothing of those that decode
    lost = time - plain;
    cost_.learn(rows, planned_tokens_, drafted, time);
  }
  const double saved = samples == 0 ? 0.0 : cost_.of(samples, samples, 0) * accepted / samples;
  regret_.settle(time, plain, drafted > 0 ? saved - lost : 0.0);
}

// Of so many more tokens those that may be drafted even if every guess should be wrong.
int32_t Scheduler::affordable(int32_t room) const {
  const double plain = cost_of_step(0);
  while (room > 0 && !regret_.covers(cost_of_step(room) - plain)) --room;
  return room;
}

// Could the step be better with drafts, if their guesses were as sure as they get?
bool Scheduler::drafts_may_pay(int32_t samples, int32_t room) const {
  const double now = samples / cost_of_step(0);
  for (int32_t extra = 1; extra <= room; ++extra) {
    const double then = (samples + kSurest * extra) / cost_of_step(extra);
    if (then > kMargin * now) return true;
  }
  return false;
}

// Adds drafts to the rows that sample. They take what is left of tokens, samples and blocks when
// all else is planned, so nobody waits or is preempted for one.
void Scheduler::plan_drafts() {
  if (config_.max_draft == 0) return;
  const auto samples = static_cast<int32_t>(num_samples());
  if (samples == 0) return;
  const int32_t room = affordable(std::min(tokens_left(), config_.max_samples - samples));
  if (!drafts_may_pay(samples, room)) return;
  guesses_.clear();
  for (Row& row : rows_) {
    if (row.samples > 0) propose(row);
  }
  cut_drafts(samples, room);
  for (Row& row : rows_) {
    if (row.num_drafted > 0) make_room_for_draft(row);
  }
}

void Scheduler::propose(Row& row) {
  Sequence& sequence = *row.sequence;
  const int32_t limit = std::min(draft_limit(sequence), config_.max_draft);
  if (limit <= 0) return;
  if (sequence.drafter == nullptr) {
    sequence.drafter = std::make_unique<Drafter>(acceptance_.as_prior());
  }
  row.first_guess = guesses_.size();
  row.num_guesses = sequence.drafter->propose(sequence.tokens, limit, kLeast, guesses_);
  for (int32_t i = 0; i < row.num_guesses; ++i) {
    if (ends_draft(sequence, guess(row, i).token)) row.num_guesses = i;
  }
}

// Of all guesses takes the likeliest, as many as make the step yield the most for its time. A
// guess is never likelier than the one before it in its draft, so what is taken are heads of
// drafts.
void Scheduler::cut_drafts(int32_t samples, int32_t room) {
  ranking_.clear();
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (int32_t g = 0; g < rows_[i].num_guesses; ++g) {
      ranking_.emplace_back(guess(rows_[i], g).chance, static_cast<int32_t>(i));
    }
  }
  const auto likelier = [](const auto& a, const auto& b) { return a.first > b.first; };
  std::stable_sort(ranking_.begin(), ranking_.end(), likelier);
  const auto most = std::min(ranking_.size(), static_cast<size_t>(room));
  double yield = samples;
  double best = kMargin * samples / cost_of_step(0);
  size_t taken = 0;
  for (size_t i = 0; i < most; ++i) {
    yield += ranking_[i].first;
    if (!is_size(static_cast<int32_t>(i) + 1)) continue;
    const double rate = yield / cost_of_step(static_cast<int32_t>(i) + 1);
    if (rate <= best) continue;
    best = rate;
    taken = i + 1;
  }
  for (size_t i = 0; i < taken; ++i) ++rows_[static_cast<size_t>(ranking_[i].second)].num_drafted;
}

void Scheduler::make_room_for_draft(Row& row) {
  Sequence& sequence = *row.sequence;
  while (row.num_drafted > 0 && !blocks_.grow(sequence, sequence.num_tokens() + row.num_drafted)) {
    --row.num_drafted;
  }
  row.samples += row.num_drafted;
  planned_tokens_ += row.num_drafted;
  stats_.num_drafts += row.num_drafted > 0;
  stats_.num_draft_tokens += row.num_drafted;
}

// Takes the samples of a row as single steps would have, as far as they count.
void Scheduler::take_samples(Row& row, std::span<const int64_t> sampled) {
  Sequence& sequence = *row.sequence;
  for (int32_t i = 0; i < row.samples; ++i) {
    const auto token = static_cast<TokenId>(sampled[static_cast<size_t>(i)]);
    const int32_t before = sequence.num_tokens();
    const Phase phase = sequence.thinking.phase;
    const bool right = i < row.num_guesses && token == guess(row, i).token;
    if (i < row.num_guesses) {
      sequence.drafter->learn(guess(row, i).level, right);
      acceptance_.learn(guess(row, i).level, right);
    }
    apply(sequence, token);
    const bool plain = sequence.num_tokens() == before + 1 && sequence.thinking.phase == phase;
    if (sequence.finished() || !right || !plain || i == row.num_drafted) return;
    ++sequence.num_computed;
    ++row.num_accepted;
    ++stats_.num_accepted_tokens;
  }
}

}  // namespace s1
