// Multi-step decode: decode steps that the device takes by itself, budgets included, ahead of the
// host.
//
// Owns which sequence is in which row of the device batch, and how many steps are in flight. The
// host afterwards applies the output tokens through its own state machine, which remains the
// definition. When the host decides something meanwhile (a limit, an abort, a stop string), the
// sequence leaves its row, and what the device goes on to sample there is dropped.

#pragma once

#include <span>
#include <vector>

#include "block_manager.hpp"
#include "device_batch.hpp"
#include "scheduled_batch.hpp"

namespace s1 {

class MultiStepRun {
 public:
  explicit MultiStepRun(BlockManager& blocks) : blocks_(blocks) {}

  // Writes the rows of `plan` to `device_batch` and allocates the blocks of up to `num_steps`
  // steps. Returns the steps that the device may take; 0 if blocks or phrases do not suffice.
  int32_t begin(const StepPlan& plan, ScheduledBatch& batch, DeviceBatch& device_batch,
                int32_t num_steps);

  // Allocates the blocks of up to `num_steps` more steps and writes them to the block table.
  // Returns the steps that the device may take.
  int32_t extend(ScheduledBatch& batch, int32_t num_steps);

  // Calls apply_token(sequence, token) for each token that the next `num_steps` steps sampled.
  // `sampled`: [num_steps, rows], kNoToken if a step sampled nothing for the row. Returns how many
  // tokens were computed. Throws std::logic_error if host and device disagree.
  template <typename ApplyToken>
  int32_t apply(std::span<const TokenId> sampled, int32_t num_steps,
                const ApplyToken& apply_token) {
    check_invariant(num_steps > 0 && num_steps <= num_steps_in_flight_,
                    "apply_multi_step() of steps that were never taken");
    check_invariant(sampled.size() == rows_.size() * static_cast<size_t>(num_steps),
                    "one token per row and step");
    int32_t num_computed = 0;
    for (const TokenId* token = sampled.data(); token != sampled.data() + sampled.size();) {
      for (size_t row = 0; row < rows_.size(); ++row, ++token) {
        Sequence* sequence = rows_[row];
        if (sequence == nullptr) continue;
        const bool samples = sequence->num_pending() == 1;
        check_invariant(samples == (*token != kNoToken), "host and device disagree about a row");
        ++sequence->num_computed;
        ++num_computed;
        if (samples) apply_token(*sequence, *token);
        if (!sequence->finished()) blocks_.cache_full_blocks(*sequence);
      }
    }
    num_steps_in_flight_ -= num_steps;
    return num_computed;
  }

  // Empties the row of a sequence that the device knows has finished. Returns false if it has none.
  bool remove(const Sequence& sequence);
  // Empties the row of a sequence about which the host decided otherwise, so the run must end.
  void invalidate(const Sequence& sequence) { stale_ |= remove(sequence); }
  // Forgets all rows.
  void clear() { rows_.clear(); }
  // Forgets all rows and the steps in flight. The device has ended them.
  void cancel() {
    clear();
    num_steps_in_flight_ = 0;
  }

  // Steps that the device may take or has taken and that are not applied yet.
  int32_t num_steps_in_flight() const { return num_steps_in_flight_; }

  // False once only a new plan can change the batch for the better.
  bool worth_extending() const;

  // By row; null where the sequence has left.
  std::span<Sequence* const> rows() const { return rows_; }

 private:
  int32_t allocate_steps(int32_t num_steps);
  void write_block_tables(ScheduledBatch& batch) const;

  BlockManager& blocks_;
  std::vector<Sequence*> rows_;
  int32_t num_steps_in_flight_ = 0;
  bool stale_ = false;  // the host decided what the device does not know
};

}  // namespace s1
