// Which sequences compute which tokens next, and what becomes of the tokens they sample.
//
// Owns all sequences from add() to remove(). schedule() and update() alternate, one pair a step;
// instead of update() the plan may become a run (run.hpp), whose steps are extended and replayed.
// Every other call is legal at any moment between these. Not thread-safe: one thread steps. Knows
// nothing of models, devices or texts.
//
// A step takes, within the token budget: first every running sequence with one pending token, then
// running ones with more (in chunks), then waiting ones in order of (priority, order, arrival), as
// long as blocks are left for a share of what the running ones may still add (their budgets bound
// it; scheduler.cpp says how the share adapts). When blocks run out, the running sequence that
// comes last in that order gives all of its up and waits again; what it had computed is computed
// anew, or found in the prefix cache. Into what is left come drafts (speculation.cpp), where they
// make the step worth more than it costs.

#pragma once

#include <memory>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "regret_budget.hpp"
#include "scheduled_batch.hpp"
#include "block_manager.hpp"
#include "core_output.hpp"
#include "device_batch.hpp"
#include "sequence.hpp"
#include "step_cost.hpp"

namespace s1 {

struct SchedulerConfig {
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t max_num_seqs = 0;            // rows of a step, and req_indices
  int32_t max_num_batched_tokens = 0;  // tokens of a step, at least max_num_seqs
  bool enable_prefix_caching = true;
  double min_reserve = 0.05;  // least share of what runs may still add that admission keeps free;
                              // 1: none is preempted while answers stay usual
  int32_t max_draft = 0;      // tokens that may be drafted for a sequence in a step; 0: no drafts
  int32_t max_samples = 0;    // of a step; 0: max_num_seqs
  std::vector<std::pair<int32_t, double>> step_costs;  // (tokens, time), see StepCost
};

// Counters since the start, and the present state.
struct SchedulerStats {
  int64_t num_steps = 0;
  int64_t num_computed_tokens = 0;  // tokens that went through the model
  int64_t num_sampled_tokens = 0;
  int64_t num_forced_tokens = 0;
  int64_t num_preemptions = 0;
  int64_t num_drafts = 0;           // of one sequence in one step
  int64_t num_draft_tokens = 0;     // in them
  int64_t num_accepted_tokens = 0;  // of those, sampled as drafted
  int64_t num_undrafted = 0;        // sequences whose sampling or answer forbids drafts
  int64_t prefix_queries = 0;       // prompt tokens looked up
  int64_t prefix_hits = 0;          // prompt tokens found
  int32_t num_running = 0;
  int32_t num_waiting = 0;
  int32_t num_free_blocks = 0;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Throws std::invalid_argument if the id is taken, the prompt is empty, or the sequence could
  // never fit into the cache alone.
  void add(const SequenceSpec& spec);

  // Plans a step into `batch`. Returns the ids that got a req_index, so that the caller can set up
  // their sampling state; an empty plan has num_rows == 0.
  const std::vector<SeqId>& schedule(ScheduledBatch& batch);

  // Takes one sampled token for each sample of the plan. Afterwards outputs() tells what
  // happened.
  void update(std::span<const int64_t> sampled);

  // What the step that update() has just ended took, in the unit of step_costs: drafts are made
  // accordingly. Need not be called, least of all for a step that took longer than others like it.
  void record_step_time(double time);

  // Instead of update(): lets the device take up to `steps` decode steps of the planned sequences
  // by itself, and writes what it needs to `run`. Returns how many it may take; 0 if the plan is no
  // run: a sequence has more than `max_inline_tokens` tokens to compute, or blocks or phrases lack
  // room. Then update() must follow as ever.
  int32_t begin_multi_step(ScheduledBatch& batch, DeviceBatch& run, int32_t steps,
                           int32_t max_inline_tokens);

  // More steps of the same lanes, before the earlier ones are replayed; new blocks are written to
  // the batch's block_table. 0: replay what is under way, then plan anew.
  int32_t extend_multi_step(ScheduledBatch& batch, int32_t steps);

  // Takes the tokens of the run's next `steps` steps, [steps, lanes], kNoToken where the device did
  // not decide, as so many calls of update() would. std::logic_error if host and device disagree.
  void apply_multi_step(std::span<const TokenId> sampled, int32_t steps);

  // Steps that the device may take or has taken and that are not replayed yet.
  int32_t num_steps_in_flight() const { return run_steps_; }

  // Sequences that the last update ended, and stream_output ones that it gave tokens, with the
  // req_indices that they had in the step. Ended ones wait for remove().
  const std::vector<std::pair<SeqId, int32_t>>& outputs() const { return outputs_; }
  // Those among them that the update ended.
  const std::vector<SeqId>& finished() const { return finished_; }
  // Records (progress.hpp) of all progressed ones.
  std::string collect_outputs();
  // Children that the last add() or update() forked off, each with its parent's id. They wait to be
  // scheduled like any sequence; the prefix cache gives them what their parent has computed.
  const std::vector<std::pair<SeqId, SeqId>>& forked() const { return forked_; }
  // Tokens that the last update appended, with the req_index of each; forced ones included.
  const std::vector<int32_t>& appended_req_indices() const { return appended_req_indices_; }
  const std::vector<TokenId>& appended_tokens() const { return appended_tokens_; }

  // Ends a sequence, whatever it is doing. Does nothing if it has ended or is unknown.
  void finish(SeqId id, FinishReason reason);
  // Lowers the thinking maximum of a live sequence; no effect once it answers.
  void limit_thinking(SeqId id, int32_t max_thinking, EndReason reason);
  // From now on only the end of the sequence is reported.
  void stop_streaming(SeqId id) { get(id).stream_output = false; }
  // Forgets an ended sequence.
  void remove(SeqId id);

  // Throws std::out_of_range if unknown.
  Sequence& get(SeqId id);
  bool has_unfinished() const { return !running_.empty() || !waiting_.empty(); }
  SchedulerStats stats() const;
  void clear_cache() { blocks_.clear_cache(); }
  const SchedulerConfig& config() const { return config_; }

  // Throws std::logic_error unless every sequence, req_index and block is accounted for. For tests.
  void check_integrity() const;

 private:
  struct Row {
    Sequence* sequence;
    int32_t num_scheduled;    // pending tokens
    int32_t samples;          // behind the last pending token and each drafted one; 0: it is not
                              // among those scheduled
    int32_t num_drafted = 0;  // leading guesses that are computed
    int32_t num_accepted = 0;
    int32_t num_guesses = 0;  // in guesses_, from first_guess on
    size_t first_guess = 0;
  };
  struct Precedes {
    bool operator()(const Sequence* a, const Sequence* b) const { return a->precedes(*b); }
  };

  int32_t num_samples() const;
  int32_t tokens_left() const { return config_.max_num_batched_tokens - planned_tokens_; }
  void plan(Sequence& sequence);
  void plan_running();
  void plan_waiting();
  double cost_of_step(int32_t drafted) const;
  int32_t affordable(int32_t room) const;
  bool drafts_may_pay(int32_t samples, int32_t room) const;
  void plan_drafts();
  void propose(Row& row);
  void cut_drafts(int32_t samples, int32_t room);
  void make_room_for_draft(Row& row);
  const DraftToken& guess(const Row& row, int32_t i) const {
    return guesses_[row.first_guess + static_cast<size_t>(i)];
  }
  int32_t growth_blocks(const Sequence& sequence) const;
  int32_t blocks_to_come(const Sequence& sequence) const;
  bool make_room(Sequence& sequence, int32_t num_tokens);
  void preempt(Sequence& victim);
  void stop_running(Sequence& sequence);
  void write_row(ScheduledBatch& batch, const Row& row) const;
  void write_table(ScheduledBatch& batch, int32_t index, const Sequence& sequence) const;
  void write_samples(ScheduledBatch& batch, const Row& row) const;
  void clear_news_of_step();
  void take_samples(Row& row, std::span<const int64_t> sampled);
  void apply(Sequence& sequence, TokenId sampled);
  void report(const Sequence& sequence, int32_t req_index, int32_t num_tokens_before);
  void limit(Sequence& sequence, int32_t max_thinking, EndReason reason);
  bool plan_is_run(int32_t max_inline_tokens) const;
  int32_t make_room_for_run(int32_t steps);
  bool run_must_end() const;
  void write_run_table(ScheduledBatch& batch) const;
  void replay_lane(Sequence& sequence, TokenId sampled);
  bool take_off_lane(const Sequence& sequence);
  void fork_at_start(Sequence& parent);
  void fork_where_budgets_part(Sequence& parent, TokenId sampled);
  void fork(const Sequence& parent, const Checkpoint& checkpoint, const BudgetState& state,
            TokenId sampled, const Appended& appended);
  void watch_for_loop(Sequence& sequence);
  void append(Sequence& sequence, TokenId sampled, uint8_t region, const Appended& appended);
  void append_token(Sequence& sequence, TokenId token, uint8_t mark);
  void end(Sequence& sequence, FinishReason reason);

  SchedulerConfig config_;
  double reserve_;
  BlockManager blocks_;
  StepCost cost_;
  RegretBudget regret_;
  AcceptanceStats acceptance_;  // of all sequences
  std::unordered_map<SeqId, std::unique_ptr<Sequence>> sequences_;
  std::set<Sequence*, Precedes> waiting_;
  std::vector<Sequence*> running_;
  std::vector<int32_t> free_rows_;
  std::vector<Row> rows_;                            // the plan between schedule() and update()
  std::vector<Sequence*> candidates_;                // scratch of plan_running()
  std::vector<DraftToken> guesses_;                  // of the plan
  std::vector<std::pair<double, int32_t>> ranking_;  // scratch of cut_drafts(): chance, row
  int32_t planned_tokens_ = 0;
  bool in_step_ = false;          // between schedule() and update()
  bool preempted_ = false;        // in this step
  bool has_news_ = false;         // something came, ended or forked since the last plan
  std::vector<Sequence*> lanes_;  // of the run; null: nobody listens any more
  int32_t run_steps_ = 0;         // taken or to be taken by the device, not replayed
  bool run_is_stale_ = false;     // the host decided what the device does not know
  int64_t next_arrival_ = 0;
  uint64_t next_admission_ = 1;
  std::vector<std::unique_ptr<Sequence>> removed_in_step_;
  std::vector<SeqId> admitted_;
  std::vector<std::pair<SeqId, int32_t>> outputs_;
  std::vector<SeqId> finished_;
  std::vector<std::pair<SeqId, SeqId>> forked_;
  std::vector<int32_t> appended_req_indices_;
  std::vector<TokenId> appended_tokens_;
  SchedulerStats stats_;
};

}  // namespace s1
