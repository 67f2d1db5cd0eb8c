// The scheduler's side of a run (run.hpp): begin it from a plan, extend it, replay what it sampled.

#include "device_batch.hpp"

#include <algorithm>

#include "scheduler.hpp"

namespace s1 {

namespace {

// Writes lanes; phrases that do not fit are noticed, not written.
class LaneWriter {
 public:
  LaneWriter(DeviceBatch& run, int32_t block_size) : run_(run), block_size_(block_size) {
    run_.num_phrases = 0;
    std::fill_n(run_.lanes, static_cast<size_t>(kNumRowFields) * static_cast<size_t>(run_.rows), 0);
    for (int32_t lane = 0; lane < run_.rows; ++lane) {
      run_.at(kFinish, lane) = static_cast<int32_t>(FinishReason::kStop);
      run_.slot_mapping[lane] = run_.null_slot;
      run_.sample_positions[lane] = 1;
    }
  }

  bool fits() const { return fits_; }

  void write(int32_t lane, const Sequence& sequence) {
    write_state(lane, sequence);
    write_params(lane, sequence);
    write_inputs(lane, sequence);
  }

 private:
  template <typename Tokens>
  int32_t put(const Tokens& tokens) {
    const int32_t begin = run_.num_phrases;
    fits_ = fits_ && tokens.size() <= static_cast<size_t>(run_.max_phrases - begin);
    if (!fits_) return 0;
    std::copy(tokens.begin(), tokens.end(), run_.phrases + begin);
    run_.num_phrases += static_cast<int32_t>(tokens.size());
    return begin;
  }

  template <typename Tokens>
  void put(int32_t lane, RowField begin, RowField length, const Tokens& tokens) {
    run_.at(begin, lane) = put(tokens);
    run_.at(length, lane) = static_cast<int32_t>(tokens.size());
  }

  void write_state(int32_t lane, const Sequence& sequence) {
    const BudgetState& state = sequence.thinking;
    run_.at(kPhase, lane) = static_cast<int32_t>(state.phase);
    run_.at(kBanned, lane) = state.banned;
    run_.at(kTailNewline, lane) = state.tail_newline;
    run_.at(kThinkingTokens, lane) = state.thinking_tokens;
    run_.at(kMaxThinking, lane) = state.max_thinking;
    run_.at(kWaitsUsed, lane) = state.waits_used;
    const auto first = static_cast<size_t>(sequence.num_computed);
    put(lane, kPending, kRemaining, std::span(sequence.tokens).subspan(first + 1));
    run_.at(kInput, lane) = sequence.tokens[first];
    run_.at(kPosition, lane) = sequence.num_computed;
    run_.at(kFinish, lane) = 0;
  }

  void write_params(int32_t lane, const Sequence& sequence) {
    run_.at(kMaxLen, lane) = sequence.max_len;
    put(lane, kStopBegin, kStopLen, sequence.stop_tokens);
    if (sequence.thinking.phase != Phase::kThinking) return;
    const BudgetParams& params = sequence.budget;
    const BudgetFormat& format = *params.format;
    run_.at(kMinThinking, lane) = params.min_thinking;
    run_.at(kNumWaits, lane) = params.num_waits;
    put(lane, kWaitBegin, kWaitLen, params.wait);
    run_.at(kWaitNewline, lane) = !params.wait.empty() && format.is_newline(params.wait.back());
    put(lane, kNaturalBegin, kNaturalLen, format.natural_end);
    put(lane, kForcedBegin, kNewlineLen, format.newline);
    put(params.forced_end);  // directly behind the newline
    run_.at(kForcedLen, lane) = static_cast<int32_t>(params.forced_end.size());
    run_.at(kNewlineAlways, lane) = format.newline_always;
  }

  void write_inputs(int32_t lane, const Sequence& sequence) {
    const int32_t position = sequence.num_computed;
    const auto block =
        static_cast<int64_t>(sequence.blocks[static_cast<size_t>(position / block_size_)]);
    run_.at(kInputIds, lane) = run_.at(kInput, lane);
    run_.at(kPositions, lane) = position;
    run_.at(kContextLens, lane) = position + 1;
    run_.at(kSampleBanned, lane) = bans_triggers(sequence.budget, sequence.thinking);
    run_.slot_mapping[lane] = block * block_size_ + position % block_size_;
    run_.sample_positions[lane] = position + 1;
  }

  DeviceBatch& run_;
  int32_t block_size_;
  bool fits_ = true;
};

}  // namespace

// All that runs must be in the plan, and done with it but for a phrase short enough to be fed.
bool Scheduler::plan_is_run(int32_t max_inline_tokens) const {
  if (rows_.empty() || rows_.size() != running_.size()) return false;
  return std::all_of(rows_.begin(), rows_.end(), [&](const Row& row) {
    return row.samples && row.num_scheduled <= max_inline_tokens;
  });
}

int32_t Scheduler::begin_multi_step(ScheduledBatch& batch, DeviceBatch& run, int32_t steps,
                                    int32_t max_inline_tokens) {
  check(in_step_, "begin_multi_step() without a plan");
  check(config_.max_draft == 0, "a run of a scheduler that drafts");
  check(steps > 0 && run.rows >= static_cast<int32_t>(rows_.size()), "a run too small");
  if (!plan_is_run(max_inline_tokens)) return 0;
  lanes_.clear();
  for (const Row& row : rows_) lanes_.push_back(row.sequence);
  steps = make_room_for_run(steps);
  LaneWriter writer(run, config_.block_size);
  for (size_t lane = 0; lane < lanes_.size(); ++lane) {
    writer.write(static_cast<int32_t>(lane), *lanes_[lane]);
  }
  if (steps == 0 || !writer.fits()) {
    lanes_.clear();
    return 0;
  }
  write_run_table(batch);
  in_step_ = false;
  run_is_stale_ = false;
  run_steps_ = steps;
  return steps;
}

// Blocks for the tokens of `steps` more steps and for the position after them, without preemption;
// fewer steps if that is too many. Returns the steps that have room.
int32_t Scheduler::make_room_for_run(int32_t steps) {
  const auto target = [&](const Sequence& sequence) {
    return std::min(sequence.num_computed + run_steps_ + steps + 1, sequence.max_len);
  };
  for (; steps > 0; steps /= 2) {
    int64_t missing = 0;
    for (const Sequence* s : lanes_) {
      if (s == nullptr) continue;
      missing +=
          std::max(blocks_.blocks_for(target(*s)) - static_cast<int32_t>(s->blocks.size()), 0);
    }
    if (missing > blocks_.num_free()) continue;
    for (Sequence* s : lanes_) {
      if (s != nullptr) check(blocks_.grow(*s, target(*s)), "room was counted");
    }
    return steps;
  }
  return 0;
}

// Is there something that only a new plan can do?
bool Scheduler::run_must_end() const {
  const auto live = static_cast<size_t>(
      std::count_if(lanes_.begin(), lanes_.end(), [](const Sequence* s) { return s != nullptr; }));
  const bool admits = has_news_ && !waiting_.empty() && !free_rows_.empty();
  return run_is_stale_ || admits || 2 * live < lanes_.size() || live == 0;
}

int32_t Scheduler::extend_multi_step(ScheduledBatch& batch, int32_t steps) {
  if (run_steps_ == 0 || run_must_end()) return 0;
  steps = make_room_for_run(steps);
  write_run_table(batch);
  run_steps_ += steps;
  return steps;
}

void Scheduler::write_run_table(ScheduledBatch& batch) const {
  for (size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (lanes_[lane] != nullptr) write_table(batch, static_cast<int32_t>(lane), *lanes_[lane]);
  }
}

void Scheduler::apply_multi_step(std::span<const TokenId> sampled, int32_t steps) {
  check(steps > 0 && steps <= run_steps_, "apply_multi_step() of steps that were never taken");
  check(sampled.size() == lanes_.size() * static_cast<size_t>(steps), "one token a lane and step");
  clear_news_of_step();
  struct Before {
    Sequence* sequence;
    int32_t req_index;
    int32_t num_tokens;
  };
  std::vector<Before> before;
  for (Sequence* s : lanes_) {
    if (s != nullptr) before.push_back({s, s->req_index, s->num_tokens()});
  }
  for (int32_t step = 0; step < steps; ++step) {
    const TokenId* tokens = sampled.data() + static_cast<size_t>(step) * lanes_.size();
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      if (lanes_[lane] != nullptr) replay_lane(*lanes_[lane], tokens[lane]);
    }
  }
  for (const auto& [sequence, req_index, num_tokens] : before) {
    report(*sequence, req_index, num_tokens);
  }
  stats_.num_steps += steps;
  run_steps_ -= steps;
}

// One step of one lane, exactly as update() would have taken it.
void Scheduler::replay_lane(Sequence& sequence, TokenId sampled) {
  const bool decides = sequence.num_pending() == 1;
  check(decides == (sampled != kNoToken), "host and device disagree about a lane");
  ++sequence.num_computed;
  ++stats_.num_computed_tokens;
  if (decides) apply(sequence, sampled);
  if (!sequence.finished()) blocks_.commit(sequence);
}

// What the device does on the lane of this sequence no longer counts. Was it on one?
bool Scheduler::take_off_lane(const Sequence& sequence) {
  const auto lane = std::find(lanes_.begin(), lanes_.end(), &sequence);
  if (lane == lanes_.end()) return false;
  *lane = nullptr;
  return true;
}

}  // namespace s1
