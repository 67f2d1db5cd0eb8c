#include "scheduler.hpp"

#include <algorithm>
#include <new>

#include "checkpoint_branches.hpp"
#include "core_output.hpp"
#include "victim.hpp"

namespace s1 {

namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Half a marker is no text: a sequence that ends in one ends before it.
void drop_held(Sequence& sequence) {
  if (sequence.thinking.held == 0) return;
  sequence.drop(sequence.thinking.held);
  sequence.thinking.held = 0;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config),
      blocks_(config.num_blocks, config.block_size, config.enable_prefix_caching, config.max_window,
              config.max_num_batched_tokens, config.max_len),
      reserve_(config.min_reserve, blocks_),
      chunks_(config.max_step_time),
      drafts_(config.max_draft, config.max_num_seqs, config.max_num_batched_tokens,
              config.step_costs),
      run_(blocks_),
      run_length_(config.max_run_time) {
  require(config.min_reserve >= 0 && config.min_reserve <= 1, "min_reserve must be in [0, 1]");
  require(config.max_num_seqs > 0, "max_num_seqs must be positive");
  require(config.max_num_batched_tokens >= config.max_num_seqs,
          "max_num_batched_tokens must be at least max_num_seqs");
  require(config.max_draft >= 0, "max_draft must not be negative");
  require(config.max_window >= 0, "max_window must not be negative");
  require(config.max_step_time >= 0, "max_step_time must not be negative");
  require(config.max_run_time >= 0, "max_run_time must not be negative");
  config_.max_samples = std::max(config.max_samples, config.max_num_seqs);
  for (int32_t row = config.max_num_seqs; row-- > 0;) free_rows_.push_back(row);
  running_.reserve(free_rows_.size());
}

/* === sequences: add, end, remove === */

void Scheduler::add(const SequenceSpec& spec) {
  events_.forked.clear();
  require(!sequences_.contains(spec.id), "sequence id is taken");
  require(!spec.prompt.empty(), "prompt is empty");
  require(blocks_.window().max_blocks(spec.max_len, spec.max_len) <=
              blocks_.num_blocks() - blocks_.max_pinned(),
          "sequence exceeds the cache");
  require(!spec.pin || blocks_.num_blocks_for(static_cast<int32_t>(spec.prompt.size())) <=
                           blocks_.max_pinned(),
          "prompt exceeds what can be pinned");
  auto added = std::make_unique<Sequence>(spec);
  Sequence& sequence = *added;
  sequence.arrival = next_arrival_;
  Branches branches;
  if (spec.thinking_tokens >= 0) {
    branches = branch_at_start(sequence);
    sequence.append_transition(0, kThink, start_thinking(sequence.budget, sequence.thinking));
  }
  const bool whole = spec.thinking_tokens < 0 && sequence.num_tokens() == spec.max_len;
  require(whole || sequence.num_tokens() < spec.max_len, "no room for an answer within max_len");
  require(spec.num_to_score < sequence.prompt_len, "the prompt has too few tokens to score");
  enqueue(std::move(added));
  try {
    add_branches(sequence, std::move(branches));
  } catch (...) {
    for (const auto& [branch, parent] : events_.forked) erase_waiting(branch);
    events_.forked.clear();
    erase_waiting(spec.id);
    throw;
  }
  ++next_arrival_;
  stats_.num_undrafted += config_.max_draft > 0 && spec.drafting != Drafting::kAlways;
  stats_.num_forced_tokens += sequence.num_forced;
}

void Scheduler::enqueue(std::unique_ptr<Sequence> sequence) {
  const SeqId id = sequence->id;
  const auto [entry, is_new] = sequences_.try_emplace(id, std::move(sequence));
  require(is_new, "sequence id is taken");
  try {
    waiting_.enter(*entry->second);
  } catch (...) {
    sequences_.erase(entry);
    throw;
  }
  queue_changed_ = true;
}

void Scheduler::erase_waiting(SeqId id) {
  Sequence& sequence = get(id);
  waiting_.erase(sequence);
  waiting_.leave(sequence);
  sequences_.erase(id);
}

// Adds the branches at the first checkpoints of `parent`, which are removed.
void Scheduler::add_branches(Sequence& parent, std::vector<std::unique_ptr<Sequence>> branches) {
  events_.forked.reserve(events_.forked.size() + branches.size());
  for (auto& branch : branches) {
    const auto [id, num_forced] = std::pair(branch->id, branch->num_forced);
    enqueue(std::move(branch));
    parent.checkpoints.erase(parent.checkpoints.begin());
    events_.forked.emplace_back(id, parent.id);
    stats_.num_forced_tokens += num_forced;
  }
}

Sequence* Scheduler::find(SeqId id) {
  const auto entry = sequences_.find(id);
  return entry == sequences_.end() ? nullptr : entry->second.get();
}

Sequence& Scheduler::get(SeqId id) {
  Sequence* sequence = find(id);
  if (sequence == nullptr) throw std::out_of_range("unknown sequence");
  return *sequence;
}

void Scheduler::finish(SeqId id, FinishReason reason) {
  Sequence* sequence = find(id);
  if (sequence == nullptr || sequence->finished()) return;
  run_.invalidate(*sequence);
  finish_sequence(*sequence, reason);
}

void Scheduler::limit_thinking(SeqId id, int32_t max_thinking, EndReason reason) {
  Sequence* sequence = find(id);
  if (sequence == nullptr) return;
  const int32_t before = sequence->thinking.max_thinking;
  s1::limit_thinking(sequence->thinking, max_thinking, reason);
  if (sequence->thinking.max_thinking != before) run_.invalidate(*sequence);
}

void Scheduler::remove(SeqId id) {
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return;
  require(entry->second->finished(), "a live sequence cannot be removed");
  if (in_step_) removed_in_step_.push_back(std::move(entry->second));
  sequences_.erase(entry);
}

void Scheduler::finish_sequence(Sequence& sequence, FinishReason reason) {
  queue_changed_ = true;
  run_.remove(sequence);
  drop_held(sequence);
  if (sequence.running) {
    if (sequence.pin && reason == FinishReason::kLength) blocks_.pin_prompt(sequence);
    stop_running(sequence);
  } else {
    waiting_.erase(sequence);
  }
  waiting_.leave(sequence);
  sequence.finish_reason = reason;
  sequence.drafter.reset();
  reserve_.record_end();
  if (sequence.thinking.phase == Phase::kThinking) {
    sequence.thinking.end_reason = reason == FinishReason::kLength     ? EndReason::kLength
                                   : reason == FinishReason::kDeadline ? EndReason::kDeadline
                                                                       : EndReason::kAbort;
  }
}

// Frees the row and the blocks, whose content stays cached; the caller decides what comes next.
void Scheduler::stop_running(Sequence& sequence) {
  FairQueue::charge(sequence);
  blocks_.cache_full_blocks(sequence);
  blocks_.free(sequence);
  free_rows_.push_back(sequence.req_index);
  sequence.req_index = kNoReqIndex;
  sequence.running = false;
  --sequence.share->num_running;
  *std::find(running_.begin(), running_.end(), &sequence) = running_.back();
  running_.pop_back();
}

/* === schedule a step === */

const std::vector<SeqId>& Scheduler::schedule(ScheduledBatch& batch, double time_to_deadline) {
  check_invariant(!in_step_ && num_steps_in_flight() == 0,
                  "schedule() before update() or apply_multi_step()");
  check_invariant(config_.max_samples <= batch.max_samples, "a batch too small for the samples");
  run_.clear();
  plan_.clear();
  if (config_.max_window > 0) {
    for (Sequence* sequence : running_) blocks_.free_expired(*sequence);
  }
  chunks_.begin(time_to_deadline);
  plan_running();
  plan_waiting(nullptr);
  plan_drafts();
  queue_changed_ = false;
  plan_.put_decode_rows_first();
  batch.write(plan_, config_.block_size);
  in_step_ = !plan_.rows.empty();
  return plan_.admitted;
}

// Tokens of the sequence for which a step needs blocks. With sliding windows only those that it
// computes: earlier chunks of a long prompt may expire before later ones are computed.
int32_t Scheduler::num_tokens_to_hold(const Sequence& sequence) const {
  if (config_.max_window == 0) return sequence.num_tokens();
  return sequence.num_computed + std::min(sequence.num_pending(), tokens_left());
}

void Scheduler::plan_row(Sequence& sequence) {
  const int32_t capacity =
      static_cast<int32_t>(sequence.blocks.size()) * config_.block_size - sequence.num_computed;
  const int32_t limit = std::min({sequence.num_pending(), tokens_left(), capacity});
  const int32_t num_scheduled = chunks_.chunk_size(plan_, sequence.num_computed, limit);
  plan_.rows.push_back({.sequence = &sequence,
                        .context = sequence.num_computed,
                        .num_scheduled = num_scheduled,
                        .num_samples = num_scheduled == sequence.num_pending() &&
                                       sequence.num_tokens() < sequence.max_len});
  plan_.num_tokens += num_scheduled;
}

// Sequences with one pending token come first, then those with a few (a forced phrase, the end of a
// prompt), so that no prompt delays a stream.
void Scheduler::plan_running() {
  candidates_ = running_;
  const auto extends = std::stable_partition(candidates_.begin(), candidates_.end(),
                                             [](Sequence* s) { return s->num_pending() == 1; });
  const auto chunks = std::partition(extends, candidates_.end(), [](Sequence* s) {
    return s->num_pending() <= ChunkPlanner::kMinChunk;
  });
  const auto due_before = [](const Sequence* a, const Sequence* b) {
    return is_due_before(*a, *b);
  };
  std::sort(extends, chunks, due_before);
  std::sort(chunks, candidates_.end(), due_before);
  for (auto candidate = candidates_.begin(); candidate != candidates_.end(); ++candidate) {
    Sequence& sequence = **candidate;
    if (candidate >= chunks && sequence.running) plan_waiting(&sequence);
    if (tokens_left() == 0) continue;
    if (!sequence.running) continue;  // preempted for one before it
    if (candidate >= chunks && !chunks_.has_room(plan_)) continue;
    if (grow_or_preempt(sequence, num_tokens_to_hold(sequence))) plan_row(sequence);
  }
}

// Admits waiting sequences in order; with a running sequence `before`, those that overtake it.
void Scheduler::plan_waiting(const Sequence* before) {
  while (!waiting_.empty() && !plan_.preempted) {
    Sequence& sequence = waiting_.front();
    if (before != nullptr && !FairQueue::may_overtake(sequence, *before)) return;
    if (std::ranges::find(plan_.displaced, &sequence) != plan_.displaced.end()) return;
    while (!admit_if_fits(sequence)) {
      if (!chunks_.has_room(plan_) || !displace_for(sequence)) return;
    }
    plan_row(sequence);
  }
}

// Gives a waiting sequence a row and blocks, if both are free and the step has room for a chunk.
bool Scheduler::admit_if_fits(Sequence& sequence) {
  if (tokens_left() == 0 || free_rows_.empty() || !chunks_.has_room(plan_)) return false;
  const int32_t max_tokens = config_.max_window == 0 ? sequence.num_tokens() : tokens_left();
  int64_t headroom = 0;
  if (!running_.empty()) {
    headroom = reserved_blocks() + reserve_.growth_blocks(sequence);
  }
  if (headroom > blocks_.num_free()) return false;
  plan_.admitted.push_back(sequence.id);  // nothing allocates memory between two states
  if (!blocks_.allocate(sequence, max_tokens, static_cast<int32_t>(headroom))) {
    plan_.admitted.pop_back();
    return false;
  }
  waiting_.erase(sequence);
  admit(sequence);
  return true;
}

// Blocks that are to stay free for the running sequences.
int64_t Scheduler::reserved_blocks() const {
  int64_t reserved = 0;
  for (const Sequence* sequence : running_) reserved += reserve_.missing_blocks(*sequence);
  return reserved;
}

bool Scheduler::can_displace_any(const Sequence& sequence) const {
  return std::any_of(running_.begin(), running_.end(),
                     [&](const Sequence* s) { return can_displace(*s, sequence); });
}

// Preempts the running sequence that makes room for `sequence` first. Returns false if there is
// none, or if not even all of them would suffice.
bool Scheduler::displace_for(const Sequence& sequence) {
  if (!can_displace_any(sequence)) return false;
  // Each client keeps one sequence, unless its priority is lower.
  std::unordered_map<const ClientShare*, const Sequence*> kept;
  for (const Sequence* s : running_) {
    const Sequence*& first = kept[s->share];
    if (first == nullptr || s->precedes(*first)) first = s;
  }
  int64_t free = blocks_.num_free();
  int64_t needed = reserve_.missing_blocks(sequence);
  bool alone = true;
  for (const Sequence* s : running_) {
    const bool stays = s->priority <= sequence.priority && kept[s->share] == s;
    if (stays || !can_displace(*s, sequence)) {
      needed += reserve_.missing_blocks(*s);
      alone = false;
    } else {
      free += s->num_held_blocks();
    }
  }
  if (needed > free && !alone) return false;
  Sequence& victim = *next_victim(running_, config_, &sequence);
  plan_.displaced.push_back(&victim);
  preempt(victim);
  victim.num_displaced += victim.priority > sequence.priority;
  return true;
}

void Scheduler::admit(Sequence& sequence) {
  sequence.req_index = free_rows_.back();
  free_rows_.pop_back();
  sequence.running = true;
  ++sequence.share->num_running;
  sequence.num_charged = std::max(sequence.num_charged, sequence.num_computed);
  sequence.admission = next_admission_++;
  running_.push_back(&sequence);
  if (sequence.num_cached >= 0) return;  // admitted before
  sequence.num_cached = std::min(sequence.num_computed, sequence.prompt_len);
  stats_.prefix_queries += sequence.prompt_len;
  stats_.prefix_hits += sequence.num_cached;
}

// Drafts use the tokens, samples and blocks that are left when all else is planned, so none delays
// or preempts a sequence.
void Scheduler::plan_drafts() {
  if (config_.max_draft == 0) return;
  drafts_.choose(plan_, std::min(tokens_left(), config_.max_samples - plan_.num_samples()));
  for (PlannedRow& row : plan_.rows) {
    if (row.num_drafted == 0) continue;
    Sequence& sequence = *row.sequence;
    while (row.num_drafted > 0 &&
           !blocks_.grow(sequence, sequence.num_tokens() + row.num_drafted)) {
      --row.num_drafted;
    }
    row.num_samples += row.num_drafted;
    plan_.num_tokens += row.num_drafted;
    stats_.num_drafts += row.num_drafted > 0;
    stats_.num_draft_tokens += row.num_drafted;
  }
}

// Allocates blocks for `num_tokens` tokens, preempting other sequences if need be.
// Returns false if that preempts `sequence` itself.
bool Scheduler::grow_or_preempt(Sequence& sequence, int32_t num_tokens) {
  while (!blocks_.grow(sequence, num_tokens)) {
    Sequence& victim = *next_victim(running_, config_, nullptr);
    preempt(victim);
    if (!plan_.preempted) reserve_.record_preemption();
    plan_.preempted = true;
    if (&victim == &sequence) return false;
  }
  return true;
}

void Scheduler::preempt(Sequence& victim) {
  waiting_.insert(victim);  // may throw, so first
  const auto row = std::find_if(plan_.rows.begin(), plan_.rows.end(),
                                [&](const PlannedRow& r) { return r.sequence == &victim; });
  if (row != plan_.rows.end()) {
    plan_.num_tokens -= row->num_scheduled;
    plan_.rows.erase(row);
  }
  stop_running(victim);
  ++stats_.num_preemptions;
}

/* === apply what was sampled === */

void Scheduler::update(std::span<const int64_t> sampled) {
  check_invariant(in_step_, "update() before schedule()");
  events_.clear();
  check_invariant(sampled.size() == static_cast<size_t>(plan_.num_samples()),
                  "one token per sample");
  events_.outputs.reserve(plan_.rows.size());
  events_.finished.reserve(plan_.rows.size());
  for (PlannedRow& row : plan_.rows) {
    Sequence& sequence = *row.sequence;
    const auto own = sampled.first(static_cast<size_t>(row.num_samples));
    sampled = sampled.subspan(own.size());
    stats_.num_computed_tokens += row.num_tokens();
    if (sequence.finished()) continue;  // during the step
    sequence.num_computed += row.num_scheduled;
    const int32_t scored = std::min(sequence.num_computed, sequence.num_to_score);
    sequence.num_scored = std::max(sequence.num_scored, scored);
    const int32_t req_index = sequence.req_index;
    const int32_t before = sequence.num_settled;
    apply_samples(row, own);
    if (!sequence.finished() && sequence.num_pending() == 0) {
      finish_sequence(sequence, FinishReason::kLength);  // a prompt that is only computed
    }
    FairQueue::charge(sequence);
    report(sequence, req_index, before);
    if (!sequence.finished()) blocks_.cache_full_blocks(sequence);
  }
  ++stats_.num_steps;
  in_step_ = false;
  removed_in_step_.clear();
}

// Applies the samples of a row as single steps would have, as far as they count (see
// draft_planner.hpp).
void Scheduler::apply_samples(PlannedRow& row, std::span<const int64_t> sampled) {
  Sequence& sequence = *row.sequence;
  for (int32_t i = 0; i < row.num_samples; ++i) {
    const auto token = static_cast<TokenId>(sampled[static_cast<size_t>(i)]);
    if (token == kNoToken) {
      --sequence.num_computed;  // the same position is sampled again
      return;
    }
    const bool accepted = drafts_.verify(row, i, token);
    const bool plain = apply_token(sequence, token);
    if (sequence.finished() || !accepted || !plain || i == row.num_drafted) return;
    ++sequence.num_computed;
    ++row.num_accepted;
    ++stats_.num_accepted_tokens;
  }
}

// Returns true if the token was appended, nothing else, and the sequence goes on in its phase.
bool Scheduler::apply_token(Sequence& sequence, TokenId sampled) {
  const bool thinking = sequence.thinking.phase == Phase::kThinking;
  reserve_transition(sequence);
  if (thinking && !sequence.checkpoints.empty()) {
    add_branches(sequence, branch_before(sequence, sampled));
  }
  ++stats_.num_sampled_tokens;  // from here on nothing allocates memory
  const int32_t before = sequence.num_tokens();
  const int32_t forced_before = sequence.num_forced;
  const int32_t max_before = sequence.thinking.max_thinking;
  const Phase phase_before = sequence.thinking.phase;
  const Appended appended = advance(sequence.budget, sequence.thinking, sampled);
  const int32_t kept = before - appended.dropped;
  for (int32_t i = kept; i < before; ++i)
    record_token(sequence, ~sequence.tokens[static_cast<size_t>(i)]);
  sequence.append_transition(sampled, thinking ? kThink : kAnswer, appended);
  stats_.num_forced_tokens += sequence.num_forced - forced_before;
  if (sequence.thinking.max_thinking != max_before) run_.invalidate(sequence);  // a loop
  if (sequence.num_pending() == 0) {
    --sequence.num_computed;  // nothing was appended: the same position is sampled again
    return false;
  }
  for (int32_t i = kept; i < sequence.num_tokens(); ++i) {
    record_token(sequence, sequence.tokens[static_cast<size_t>(i)]);
  }
  const bool plain = appended.sampled && appended.dropped == 0 &&
                     sequence.num_tokens() == before + 1 && sequence.thinking.phase == phase_before;
  if (!thinking && sequence.is_end(sampled)) {
    finish_sequence(sequence, FinishReason::kStop);
  } else if (sequence.num_tokens() >= sequence.max_len) {
    finish_sequence(sequence, FinishReason::kLength);
  }
  return plain;
}

// Makes room for the events of one transition.
void Scheduler::reserve_transition(const Sequence& sequence) {
  size_t most = 1;
  if (sequence.thinking.phase == Phase::kThinking) {
    const BudgetParams& params = sequence.budget;
    const BudgetFormat& format = *params.format;
    most += static_cast<size_t>(sequence.thinking.held) + format.newline.size() +
            std::max({params.wait.size(), params.forced_end.size(), format.natural_end.size(),
                      format.after_marker.size()});
  }
  const size_t size = events_.appended_tokens.size() + most;
  if (size <=
      std::min(events_.appended_tokens.capacity(), events_.appended_req_indices.capacity())) {
    return;
  }
  events_.appended_tokens.reserve(2 * size);
  events_.appended_req_indices.reserve(2 * size);
}

void Scheduler::record_token(const Sequence& sequence, TokenId token) {
  events_.appended_req_indices.push_back(sequence.req_index);
  events_.appended_tokens.push_back(token);
}

// Reports a sequence that ended, or a streamed one that gained tokens, held ones included.
void Scheduler::report(const Sequence& sequence, int32_t req_index, int32_t num_settled_before) {
  const bool gained = sequence.num_settled > num_settled_before || sequence.thinking.held > 0;
  if (sequence.finished() || (sequence.stream_output && gained)) {
    events_.outputs.emplace_back(sequence.id, req_index);
  }
  if (sequence.finished()) events_.finished.push_back(sequence.id);
}

std::string Scheduler::collect_outputs() {
  std::string records;
  size_t size = 0;
  for (const auto& [id, req_index] : events_.outputs) size += output_size(get(id));
  records.reserve(size);
  for (const auto& [id, req_index] : events_.outputs) append_output(get(id), req_index, records);
  return records;
}

/* === multi-step decode === */

int32_t Scheduler::begin_multi_step(ScheduledBatch& batch, DeviceBatch& device_batch,
                                    int32_t num_steps, int32_t max_inline_tokens) {
  check_invariant(in_step_, "begin_multi_step() without a plan");
  check_invariant(config_.max_draft == 0, "begin_multi_step() of a scheduler that drafts");
  if (plan_.rows.size() != running_.size()) return 0;
  for (const PlannedRow& row : plan_.rows) {
    if (row.num_samples == 0 || row.num_scheduled > max_inline_tokens) return 0;
    if (row.sequence->bans_ends() || row.sequence->num_scored < row.sequence->num_to_score) {
      return 0;
    }
  }
  num_steps = run_.begin(plan_, batch, device_batch, launch_length(plan_.rows.size(), num_steps));
  if (num_steps > 0) in_step_ = false;
  return num_steps;
}

// True if a new plan may admit a sequence that the last one did not know.
bool Scheduler::may_admit() const {
  if (!queue_changed_ || waiting_.empty()) return false;
  return !free_rows_.empty() || can_displace_any(waiting_.front());
}

// Steps of the next launch over so many rows of the device batch, at most `limit`.
int32_t Scheduler::launch_length(size_t num_rows, int32_t limit) const {
  const bool awaited =
      !waiting_.empty() || std::any_of(running_.begin(), running_.end(),
                                       [](const Sequence* s) { return s->interactive; });
  return run_length_.num_steps(chunks_.decode_time(static_cast<int32_t>(num_rows)), awaited, limit);
}

int32_t Scheduler::extend_multi_step(ScheduledBatch& batch, int32_t num_steps) {
  if (num_steps_in_flight() == 0 || may_admit() || !run_.worth_extending()) return 0;
  return run_.extend(batch, launch_length(run_.rows().size(), num_steps));
}

void Scheduler::apply_multi_step(std::span<const TokenId> sampled, int32_t num_steps, double time) {
  events_.clear();
  struct Before {
    Sequence* sequence;
    int32_t req_index;
    int32_t num_settled;
  };
  std::vector<Before> before;
  for (Sequence* s : run_.rows()) {
    if (s != nullptr) before.push_back({s, s->req_index, s->num_settled});
  }
  events_.outputs.reserve(before.size());
  events_.finished.reserve(before.size());
  const auto report_all = [&] {
    for (const auto& [sequence, req_index, num_settled] : before) {
      FairQueue::charge(*sequence);
      report(*sequence, req_index, num_settled);
    }
  };
  try {
    stats_.num_computed_tokens += run_.apply(
        sampled, num_steps, [this](Sequence& s, TokenId token) { apply_token(s, token); });
  } catch (const std::bad_alloc&) {
    report_all();  // what was applied
    throw;
  }
  report_all();
  stats_.num_steps += num_steps;
  if (time > 0.0) {
    chunks_.record_decode_time(static_cast<int32_t>(run_.rows().size()), time / num_steps);
  }
}

void Scheduler::cancel_step() {
  run_.cancel();
  while (!running_.empty()) {
    Sequence& sequence = *running_.back();
    waiting_.insert(sequence);
    stop_running(sequence);
    ++stats_.num_preemptions;
  }
  plan_.clear();
  queue_changed_ = true;
  in_step_ = false;
  removed_in_step_.clear();
}

/* === state === */

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = stats_;
  stats.num_running = static_cast<int32_t>(running_.size());
  stats.num_waiting = static_cast<int32_t>(waiting_.size());
  stats.num_free_blocks = blocks_.num_free();
  stats.num_pinned_blocks = blocks_.num_pinned();
  stats.max_pinned_blocks = blocks_.max_pinned();
  return stats;
}

void Scheduler::check_integrity() const {
  std::vector<const Sequence*> live;
  std::vector<bool> rows(static_cast<size_t>(config_.max_num_seqs), false);
  for (int32_t row : free_rows_) rows[static_cast<size_t>(row)] = true;
  struct ClientCount {
    int32_t running = 0, live = 0;
  };
  std::unordered_map<int64_t, ClientCount> counts;
  size_t num_waiting = 0;
  for (const auto& [id, sequence] : sequences_) {
    const bool waits = waiting_.contains(*sequence);
    check_invariant(sequence->id == id, "sequence under a foreign id");
    check_invariant(sequence->running + waits + sequence->finished() == 1,
                    "sequence in two states");
    check_invariant(sequence->running == (sequence->req_index != kNoReqIndex),
                    "row without running");
    check_invariant(sequence->running || sequence->blocks.empty(), "blocks without running");
    check_invariant(sequence->finished() || sequence->num_pending() > 0, "live, nothing pending");
    check_invariant(sequence->num_tokens() <= sequence->max_len, "longer than max_len");
    check_invariant(sequence->num_settled == sequence->num_tokens() - sequence->thinking.held,
                    "held tokens are not the last ones");
    ClientCount& count = counts[sequence->client];
    count.running += sequence->running;
    count.live += !sequence->finished();
    num_waiting += waits;
    check_invariant(sequence->marks.size() == static_cast<size_t>(sequence->num_generated()),
                    "one mark per generated token");
    if (!sequence->running) continue;
    check_invariant(!rows[static_cast<size_t>(sequence->req_index)], "row used twice");
    rows[static_cast<size_t>(sequence->req_index)] = true;
    live.push_back(sequence.get());
  }
  check_invariant(num_waiting == waiting_.size(), "waiting sequence lost");
  for (const auto& [client, share] : waiting_.shares()) {
    check_invariant(
        counts[client].running == share.num_running && counts[client].live == share.num_live,
        "a client's sequences are counted wrongly");
  }
  check_invariant(live.size() == running_.size(), "running list is out of date");
  check_invariant(live.size() + free_rows_.size() == rows.size(), "row lost");
  blocks_.check_integrity(live);
}

}  // namespace s1
