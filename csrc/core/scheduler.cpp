#include "scheduler.hpp"

#include <algorithm>
#include <cmath>

namespace s1 {

namespace {

// Of what running sequences may still add, admission keeps a share free. It doubles in a step that
// preempts and shrinks a little with each sequence that ends: it takes 44 ends to undo one
// doubling.
constexpr double kFirstReserve = 0.25;
constexpr double kReserveGrowth = 2.0;
constexpr double kReserveDecay = 63.0 / 64.0;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config),
      reserve_(std::max(config.min_reserve, kFirstReserve)),
      blocks_(config.num_blocks, config.block_size, config.enable_prefix_caching),
      cost_(config.step_costs, config.max_num_batched_tokens),
      regret_(cost_.of(1, 1, 0)) {
  require(config.min_reserve >= 0 && config.min_reserve <= 1, "min_reserve must be in [0, 1]");
  require(config.max_num_seqs > 0, "max_num_seqs must be positive");
  require(config.max_num_batched_tokens >= config.max_num_seqs,
          "max_num_batched_tokens must be at least max_num_seqs");
  require(config.max_draft >= 0, "max_draft must not be negative");
  config_.max_samples = std::max(config.max_samples, config.max_num_seqs);
  for (int32_t req_index = config.max_num_seqs; req_index-- > 0;) free_rows_.push_back(req_index);
}

/* === sequences come and go === */

void Scheduler::add(const SequenceSpec& spec) {
  forked_.clear();
  require(!sequences_.contains(spec.id), "sequence id is taken");
  require(!spec.prompt.empty(), "prompt is empty");
  require(blocks_.blocks_for(spec.max_len) <= blocks_.num_blocks(), "sequence exceeds the cache");
  auto sequence = std::make_unique<Sequence>();
  sequence->id = spec.id;
  sequence->priority = spec.priority;
  sequence->order = spec.order;
  sequence->arrival = next_arrival_++;
  sequence->tokens.reserve(static_cast<size_t>(spec.max_len));
  sequence->tokens = spec.prompt;
  sequence->prompt_len = sequence->num_tokens();
  sequence->max_len = spec.max_len;
  sequence->stop_tokens = spec.stop_tokens;
  sequence->stream_output = spec.stream_output;
  sequence->salt = spec.salt;
  sequence->budget = spec.budget;
  sequence->drafting = spec.drafting;
  stats_.num_undrafted += config_.max_draft > 0 && spec.drafting != Drafting::kAlways;
  if (spec.thinking_tokens >= 0) {
    require(spec.budget.format != nullptr, "a thinking sequence needs a format");
    BudgetState& state = sequence->thinking;
    state.phase = Phase::kThinking;
    state.thinking_tokens = spec.thinking_tokens;
    state.max_thinking = spec.max_thinking;
    state.tail_newline = spec.budget.format->is_newline(spec.prompt.back());
    sequence->checkpoints = spec.checkpoints;
    sequence->loop_repeats = spec.loop_repeats;
    if (spec.loop_repeats > 0) sequence->loop = std::make_unique<LoopDetector>();
    fork_at_start(*sequence);
    append(*sequence, 0, kThink, start(sequence->budget, state));
  }
  require(sequence->num_tokens() < spec.max_len, "no room for an answer within max_len");
  waiting_.insert(sequence.get());
  has_news_ = true;
  sequences_.emplace(spec.id, std::move(sequence));
}

Sequence& Scheduler::get(SeqId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) throw std::out_of_range("unknown sequence");
  return *found->second;
}

void Scheduler::finish(SeqId id, FinishReason reason) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end() || found->second->finished()) return;
  if (take_off_lane(*found->second)) run_is_stale_ = true;  // the device does not know
  end(*found->second, reason);
}

void Scheduler::limit_thinking(SeqId id, int32_t max_thinking, EndReason reason) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  limit(*found->second, max_thinking, reason);
}

void Scheduler::limit(Sequence& sequence, int32_t max_thinking, EndReason reason) {
  const int32_t before = sequence.thinking.max_thinking;
  s1::limit_thinking(sequence.thinking, max_thinking, reason);
  if (sequence.thinking.max_thinking != before && take_off_lane(sequence)) run_is_stale_ = true;
}

void Scheduler::remove(SeqId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  require(found->second->finished(), "a live sequence cannot be removed");
  if (in_step_) removed_in_step_.push_back(std::move(found->second));
  sequences_.erase(found);
}

void Scheduler::end(Sequence& sequence, FinishReason reason) {
  has_news_ = true;
  take_off_lane(sequence);
  if (sequence.running) {
    stop_running(sequence);
  } else {
    waiting_.erase(&sequence);
  }
  sequence.finish_reason = reason;
  sequence.drafter.reset();
  reserve_ = std::max(reserve_ * kReserveDecay, config_.min_reserve);
  if (sequence.thinking.phase == Phase::kThinking) {
    sequence.thinking.end_reason =
        reason == FinishReason::kLength ? EndReason::kLength : EndReason::kAbort;
  }
}

// Gives up req_index and blocks, whose content stays cached; the caller decides what comes next.
void Scheduler::stop_running(Sequence& sequence) {
  blocks_.commit(sequence);
  blocks_.release(sequence);
  free_rows_.push_back(sequence.req_index);
  sequence.req_index = kNoReqIndex;
  sequence.running = false;
  *std::find(running_.begin(), running_.end(), &sequence) = running_.back();
  running_.pop_back();
}

/* === planning a step === */

const std::vector<SeqId>& Scheduler::schedule(ScheduledBatch& batch) {
  check(!in_step_ && run_steps_ == 0, "schedule() before update() or apply_multi_step()");
  check(config_.max_samples <= batch.max_samples, "a batch without room for the samples");
  lanes_.clear();
  rows_.clear();
  admitted_.clear();
  planned_tokens_ = 0;
  preempted_ = false;
  plan_running();
  plan_waiting();
  plan_drafts();
  has_news_ = false;
  batch.num_tokens = batch.num_rows = batch.num_samples = batch.num_banned = 0;
  batch.max_seqlen_q = 0;
  batch.table_rows.resize(static_cast<size_t>(batch.max_rows));
  batch.cu_seqlens_q[0] = 0;
  for (const Row& row : rows_) write_row(batch, row);
  in_step_ = !rows_.empty();
  return admitted_;
}

void Scheduler::plan(Sequence& sequence) {
  const int32_t num_scheduled = std::min(sequence.num_pending(), tokens_left());
  rows_.push_back({&sequence, num_scheduled, num_scheduled == sequence.num_pending()});
  planned_tokens_ += num_scheduled;
}

// Sequences with one pending token first, so that no prompt delays a stream; then the others.
void Scheduler::plan_running() {
  candidates_ = running_;
  const auto extends = std::stable_partition(candidates_.begin(), candidates_.end(),
                                             [](Sequence* s) { return s->num_pending() == 1; });
  std::sort(extends, candidates_.end(), Precedes());
  for (Sequence* sequence : candidates_) {
    if (tokens_left() == 0) break;
    if (!sequence->running) continue;  // preempted for one before it
    if (make_room(*sequence, sequence->num_tokens())) plan(*sequence);
  }
}

void Scheduler::plan_waiting() {
  if (waiting_.empty() || preempted_) return;
  int64_t reserved = 0;
  for (const Sequence* sequence : running_) reserved += blocks_to_come(*sequence);
  while (!waiting_.empty() && tokens_left() > 0 && !free_rows_.empty()) {
    Sequence& sequence = **waiting_.begin();
    const int64_t headroom = running_.empty() ? 0 : reserved + growth_blocks(sequence);
    if (headroom > blocks_.num_free() || !blocks_.admit(sequence, static_cast<int32_t>(headroom))) {
      break;
    }
    reserved += blocks_to_come(sequence);
    waiting_.erase(waiting_.begin());
    sequence.req_index = free_rows_.back();
    free_rows_.pop_back();
    sequence.running = true;
    sequence.admission = next_admission_++;
    running_.push_back(&sequence);
    admitted_.push_back(sequence.id);
    if (sequence.num_cached < 0) {
      sequence.num_cached = std::min(sequence.num_computed, sequence.prompt_len);
      stats_.prefix_queries += sequence.prompt_len;
      stats_.prefix_hits += sequence.num_cached;
    }
    plan(sequence);
  }
}

// Blocks that admission keeps free for the growth of a sequence: `reserve_` of what it may add.
int32_t Scheduler::growth_blocks(const Sequence& sequence) const {
  const auto growth = static_cast<int32_t>(std::ceil(reserve_ * sequence.growth()));
  return blocks_.blocks_for(sequence.num_tokens() + growth) -
         blocks_.blocks_for(sequence.num_tokens());
}

// The same for one that runs and holds some already.
int32_t Scheduler::blocks_to_come(const Sequence& sequence) const {
  const int32_t missing =
      blocks_.blocks_for(sequence.num_tokens()) - static_cast<int32_t>(sequence.blocks.size());
  return growth_blocks(sequence) + std::max(missing, 0);
}

// Blocks for `num_tokens` tokens, taken from whoever comes last; false if that is the sequence.
bool Scheduler::make_room(Sequence& sequence, int32_t num_tokens) {
  while (!blocks_.grow(sequence, num_tokens)) {
    Sequence& victim = **std::max_element(running_.begin(), running_.end(), Precedes());
    preempt(victim);
    if (&victim == &sequence) return false;
  }
  return true;
}

void Scheduler::preempt(Sequence& victim) {
  const auto row = std::find_if(rows_.begin(), rows_.end(),
                                [&](const Row& planned) { return planned.sequence == &victim; });
  if (row != rows_.end()) {
    planned_tokens_ -= row->num_scheduled;
    rows_.erase(row);
  }
  stop_running(victim);
  waiting_.insert(&victim);
  if (!preempted_) reserve_ = std::min(reserve_ * kReserveGrowth, 1.0);
  preempted_ = true;
  ++stats_.num_preemptions;
}

/* === taking the samples === */

void Scheduler::update(std::span<const int64_t> sampled) {
  check(in_step_, "update() before schedule()");
  clear_news_of_step();
  check(sampled.size() == static_cast<size_t>(num_samples()), "one token for each sample");
  for (Row& row : rows_) {
    Sequence& sequence = *row.sequence;
    const auto own = sampled.first(static_cast<size_t>(row.samples));
    sampled = sampled.subspan(own.size());
    stats_.num_computed_tokens += row.num_scheduled + row.num_drafted;
    if (sequence.finished()) continue;  // while the step was under way
    sequence.num_computed += row.num_scheduled;
    const int32_t req_index = sequence.req_index;
    const int32_t before = sequence.num_tokens();
    take_samples(row, own);
    report(sequence, req_index, before);
    if (!sequence.finished()) blocks_.commit(sequence);
  }
  ++stats_.num_steps;
  in_step_ = false;
  removed_in_step_.clear();
}

void Scheduler::clear_news_of_step() {
  outputs_.clear();
  forked_.clear();
  finished_.clear();
  appended_req_indices_.clear();
  appended_tokens_.clear();
}

// Who ended, or gained tokens under watch, is reported with the req_index that it had.
void Scheduler::report(const Sequence& sequence, int32_t req_index, int32_t num_tokens_before) {
  const bool gained = sequence.num_tokens() > num_tokens_before;
  if (sequence.finished() || (sequence.stream_output && gained)) {
    outputs_.emplace_back(sequence.id, req_index);
  }
  if (sequence.finished()) finished_.push_back(sequence.id);
}

int32_t Scheduler::num_samples() const {
  int32_t samples = 0;
  for (const Row& row : rows_) samples += row.samples;
  return samples;
}

void Scheduler::apply(Sequence& sequence, TokenId sampled) {
  ++stats_.num_sampled_tokens;
  const int32_t before = sequence.num_tokens();
  const bool thinking = sequence.thinking.phase == Phase::kThinking;
  if (thinking && !sequence.checkpoints.empty()) fork_where_budgets_part(sequence, sampled);
  append(sequence, sampled, thinking ? kThink : kAnswer,
         advance(sequence.budget, sequence.thinking, sampled));
  if (sequence.num_tokens() == before) {
    --sequence.num_computed;  // nothing appended: the same position is sampled again
    return;
  }
  const std::vector<TokenId>& stops = sequence.stop_tokens;
  if (!thinking && std::find(stops.begin(), stops.end(), sampled) != stops.end()) {
    end(sequence, FinishReason::kStop);
  } else if (sequence.num_tokens() >= sequence.max_len) {
    end(sequence, FinishReason::kLength);
  }
}

void Scheduler::append(Sequence& sequence, TokenId sampled, uint8_t region,
                       const Appended& appended) {
  if (appended.sampled) append_token(sequence, sampled, region);
  if (appended.newline) {
    for (TokenId token : sequence.budget.format->newline) {
      append_token(sequence, token, kDelimiter | kForced);
    }
  }
  if (appended.phrase == nullptr) return;
  const bool waits = sequence.thinking.phase == Phase::kThinking;
  for (size_t i = 0; i < appended.phrase->size(); ++i) {
    const bool delimiter = static_cast<int32_t>(i) < appended.delimiter_len;
    const uint8_t mark = waits ? kThink : delimiter ? kDelimiter : kAnswer;
    append_token(sequence, (*appended.phrase)[i], mark | kForced);
  }
}

void Scheduler::append_token(Sequence& sequence, TokenId token, uint8_t mark) {
  sequence.append(token, mark);
  if (sequence.loop != nullptr && (mark & kRegionMask) == kThink) watch_for_loop(sequence);
  stats_.num_forced_tokens += (mark & kForced) != 0;
  if (sequence.req_index == kNoReqIndex) return;
  appended_req_indices_.push_back(sequence.req_index);
  appended_tokens_.push_back(token);
}

// Ends thinking that goes round in circles, though not before the minimum.
void Scheduler::watch_for_loop(Sequence& sequence) {
  if (sequence.loop->push(sequence.tokens, sequence.loop_repeats)) {
    limit(sequence, sequence.budget.min_thinking, EndReason::kLoop);
  }
}

/* === looking on === */

std::string Scheduler::collect_outputs() {
  std::string records;
  for (const auto& [id, req_index] : outputs_) append_output(get(id), req_index, records);
  return records;
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = stats_;
  stats.num_running = static_cast<int32_t>(running_.size());
  stats.num_waiting = static_cast<int32_t>(waiting_.size());
  stats.num_free_blocks = blocks_.num_free();
  return stats;
}

void Scheduler::check_integrity() const {
  std::vector<const Sequence*> live;
  std::vector<bool> req_indices(static_cast<size_t>(config_.max_num_seqs), false);
  for (int32_t req_index : free_rows_) req_indices[static_cast<size_t>(req_index)] = true;
  for (const auto& [id, sequence] : sequences_) {
    const bool waits = waiting_.contains(sequence.get());
    check(sequence->id == id, "sequence under a foreign id");
    check(sequence->running + waits + sequence->finished() == 1, "sequence in two states");
    check(sequence->running == (sequence->req_index != kNoReqIndex), "req_index without running");
    check(sequence->running || sequence->blocks.empty(), "blocks without running");
    check(sequence->finished() || sequence->num_pending() > 0, "live with nothing pending");
    check(sequence->num_tokens() <= sequence->max_len, "longer than max_len");
    check(sequence->marks.size() == static_cast<size_t>(sequence->num_generated()), "marks");
    if (!sequence->running) continue;
    check(!req_indices[static_cast<size_t>(sequence->req_index)], "req_index given twice");
    req_indices[static_cast<size_t>(sequence->req_index)] = true;
    live.push_back(sequence.get());
  }
  check(live.size() == running_.size(), "running list is out of date");
  check(live.size() + free_rows_.size() == req_indices.size(), "req_index lost");
  blocks_.check_integrity(live);
}

}  // namespace s1
