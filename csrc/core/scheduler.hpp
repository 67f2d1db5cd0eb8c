// Which sequences compute which tokens next, and what becomes of the tokens they sample.
//
// Owns all sequences from add() to remove(), and the rows of the persistent batch. schedule() and
// update() alternate, one pair a step. Instead of update(), a plan may become a multi-step decode
// (multi_step_run.hpp), which is extended and whose tokens are applied. Every other call is legal
// at any moment in between. Not thread-safe: one thread steps. Knows nothing of models, devices or
// texts.
//
// Within the token budget a step contains, in this order:
//   1. every running sequence with one pending token, then those with a few;
//   2. running sequences with more, in chunks that keep the step short while a reader or a deadline
//      waits for it (chunk_planner.hpp);
//   3. waiting sequences by priority, then fairly by client (fair_queue.hpp), as long as enough
//      blocks stay free for the growth of the running ones (growth_reserve.hpp); a waiting sequence
//      precedes the chunks of lower priorities and of clients that were served more;
//   4. draft tokens where they make the step worth more than it costs (draft_planner.hpp).
// When blocks run out, the last running sequence of the client that holds most of the rows or
// blocks gives all of its blocks back and waits again. What it had computed is computed anew, or
// found in the prefix cache. A waiting sequence without a row or blocks preempts the last running
// ones of lower priority, each at most kMaxDisplacements times (victim.hpp). A client of which
// nothing runs preempts those of clients of which several do: so each has a sequence running,
// whatever the others sent. If every layer has a sliding window, blocks that have left the largest
// are freed before each plan (sliding_window.hpp).
//
// If memory runs out (std::bad_alloc), a call changes nothing and may be made again, except those
// of a step: after schedule(), update() and those of a multi-step decode, call cancel_step(). It
// may be repeated if it throws too. events() then holds what was applied before.

#pragma once

#include <limits>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_manager.hpp"
#include "chunk_planner.hpp"
#include "device_batch.hpp"
#include "draft_planner.hpp"
#include "fair_queue.hpp"
#include "growth_reserve.hpp"
#include "multi_step_run.hpp"
#include "run_length.hpp"
#include "scheduled_batch.hpp"
#include "scheduler_config.hpp"
#include "scheduler_stats.hpp"
#include "sequence.hpp"
#include "step_plan.hpp"

namespace s1 {

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Throws std::invalid_argument, and adds nothing, if the id is taken, the prompt is empty, or the
  // sequence could never fit into the cache alone. A prompt of max_len tokens is only computed: no
  // token is sampled.
  void add(const SequenceSpec& spec);

  // Plans a step into `batch`; an empty plan has num_rows == 0. Returns the ids of sequences that
  // entered the persistent batch, so that the caller can set up their sampling state.
  // `time_to_deadline`: until the next deadline of any request, in the unit of max_step_time; the
  // step should end before it. Infinite: there is none.
  const std::vector<SeqId>& schedule(
      ScheduledBatch& batch, double time_to_deadline = std::numeric_limits<double>::infinity());

  // Applies one sampled token per sample of the plan; events() then tells what happened. kNoToken:
  // the sample does not count, and the next plan samples the same position again.
  void update(std::span<const int64_t> sampled);

  // Records the duration of the step that the last update() ended, in the unit of step_costs and
  // max_step_time. Drafts and chunks are chosen by it. Optional: leave out steps that were
  // unusually long.
  void record_step_time(double time) {
    drafts_.record_step_time(plan_, time);
    chunks_.record_step_time(plan_, time);
  }
  // Estimated time of a step that decodes the running sequences, on the device if it decides the
  // steps; 0 if nothing was recorded.
  double decode_time() const { return chunks_.decode_time(static_cast<int32_t>(running_.size())); }

  // Instead of update(): lets the device take up to `num_steps` decode steps of the planned
  // sequences, fewer if these would take long (run_length.hpp), and writes what it needs to
  // `device_batch`. Returns how many steps it may take. 0:
  // update() must follow as usual, because a sequence has more than `max_inline_tokens` tokens to
  // compute or must not end yet (min_tokens), or blocks or phrases do not suffice.
  int32_t begin_multi_step(ScheduledBatch& batch, DeviceBatch& device_batch, int32_t num_steps,
                           int32_t max_inline_tokens);

  // Adds steps to the multi-step decode before its earlier steps are applied, and writes new blocks
  // to the batch's block_table. Returns how many; 0: apply what is in flight, then schedule().
  int32_t extend_multi_step(ScheduledBatch& batch, int32_t num_steps);

  // Applies the tokens of the next `num_steps` steps in flight, as that many calls of update()
  // would. `sampled`: [num_steps, rows], kNoToken where the device sampled nothing. `time`: that
  // the device took, in the unit of max_run_time; 0: unknown. Throws std::logic_error if host and
  // device disagree.
  void apply_multi_step(std::span<const TokenId> sampled, int32_t num_steps, double time = 0.0);

  // Steps that the device may take or has taken and that are not applied yet.
  int32_t num_steps_in_flight() const { return run_.num_steps_in_flight(); }

  // After a step that was interrupted anywhere between schedule() and the end of update(), or of a
  // multi-step decode that the device has ended: all running sequences give their blocks back and
  // wait again, so the next plan admits each anew. What they had applied they keep; tokens that
  // were sampled and not applied are sampled again, and are the same.
  void cancel_step();

  // What the last add(), update() or apply_multi_step() did.
  const StepEvents& events() const { return events_; }
  // Records (core_output.hpp) of all sequences in events().outputs.
  std::string collect_outputs();

  // Ends a sequence in any state. Does nothing if it has ended or is unknown.
  void finish(SeqId id, FinishReason reason);
  // Lowers the thinking maximum of a live sequence; no effect once it answers.
  void limit_thinking(SeqId id, int32_t max_thinking, EndReason reason);
  // From now on, only the end of the sequence is reported.
  void stop_streaming(SeqId id) { get(id).stream_output = false; }
  // Forgets an ended sequence.
  void remove(SeqId id);

  // Throws std::out_of_range if the id is unknown.
  Sequence& get(SeqId id);
  bool has_unfinished() const { return !running_.empty() || !waiting_.empty(); }
  SchedulerStats stats() const;
  // Sequences of a client that wait, and the tokens that it was charged for.
  int32_t num_waiting(int64_t client) const { return waiting_.num_waiting(client); }
  int64_t tokens_served(int64_t client) const { return waiting_.tokens_served(client); }
  void clear_cache() { blocks_.clear_cache(); }

  // Prefixes outside of sequences (block_manager.hpp).
  const BlockManager& blocks() const { return blocks_; }
  bool restore(Sequence& sequence, const BlockManager::FillBlocks& fill) {
    return blocks_.restore(sequence, fill);
  }
  bool pin(int64_t id, std::span<const BlockId> ids) { return blocks_.pin(id, ids); }
  void unpin(int64_t id) { blocks_.unpin(id); }

  // Throws std::logic_error unless every sequence, row and block is accounted for. For tests.
  void check_integrity() const;

 private:
  Sequence* find(SeqId id);
  void enqueue(std::unique_ptr<Sequence> sequence);
  void add_branches(Sequence& parent, std::vector<std::unique_ptr<Sequence>> branches);
  void erase_waiting(SeqId id);
  void finish_sequence(Sequence& sequence, FinishReason reason);
  void stop_running(Sequence& sequence);

  int32_t tokens_left() const { return config_.max_num_batched_tokens - plan_.num_tokens; }
  int32_t num_tokens_to_hold(const Sequence& sequence) const;
  void plan_row(Sequence& sequence);
  void plan_running();
  void plan_waiting(const Sequence* before);
  void plan_drafts();
  int64_t reserved_blocks() const;
  bool can_displace_any(const Sequence& sequence) const;
  bool displace_for(const Sequence& sequence);
  bool admit_if_fits(Sequence& sequence);
  void admit(Sequence& sequence);
  bool grow_or_preempt(Sequence& sequence, int32_t num_tokens);
  void preempt(Sequence& victim);
  bool may_admit() const;
  int32_t launch_length(size_t num_rows, int32_t limit) const;

  void apply_samples(PlannedRow& row, std::span<const int64_t> sampled);
  bool apply_token(Sequence& sequence, TokenId sampled);
  void reserve_transition(const Sequence& sequence);
  void record_token(const Sequence& sequence, TokenId token);
  void report(const Sequence& sequence, int32_t req_index, int32_t num_settled_before);

  SchedulerConfig config_;
  BlockManager blocks_;
  GrowthReserve reserve_;
  ChunkPlanner chunks_;
  DraftPlanner drafts_;
  MultiStepRun run_;
  RunLength run_length_;
  std::unordered_map<SeqId, std::unique_ptr<Sequence>> sequences_;
  FairQueue waiting_;
  std::vector<Sequence*> running_;
  std::vector<int32_t> free_rows_;  // of the persistent batch
  StepPlan plan_;
  std::vector<Sequence*> candidates_;  // scratch of plan_running()
  bool in_step_ = false;               // between schedule() and update()
  bool queue_changed_ = false;         // a sequence came, ended or branched since the last plan
  std::vector<std::unique_ptr<Sequence>> removed_in_step_;  // the plan still refers to them
  int64_t next_arrival_ = 0;
  uint64_t next_admission_ = 1;
  StepEvents events_;
  SchedulerStats stats_;
};

}  // namespace s1
