#include "multi_step_run.hpp"

#include <algorithm>

namespace s1 {

int32_t MultiStepRun::begin(const StepPlan& plan, ScheduledBatch& batch, DeviceBatch& device_batch,
                            int32_t num_steps) {
  check_invariant(num_steps > 0 && device_batch.num_rows >= plan.num_rows(),
                  "a device batch too small for the plan");
  rows_.clear();
  for (const PlannedRow& row : plan.rows) rows_.push_back(row.sequence);
  num_steps = allocate_steps(num_steps);
  device_batch.clear();
  bool fits = num_steps > 0;
  for (size_t row = 0; fits && row < rows_.size(); ++row) {
    fits = device_batch.write_row(static_cast<int32_t>(row), *rows_[row], blocks_.block_size());
  }
  if (!fits) {
    rows_.clear();
    return 0;
  }
  write_block_tables(batch);
  stale_ = false;
  num_steps_in_flight_ = num_steps;
  return num_steps;
}

int32_t MultiStepRun::extend(ScheduledBatch& batch, int32_t num_steps) {
  for (Sequence* s : rows_) {
    if (s != nullptr) blocks_.free_expired(*s);  // the steps in flight begin at num_computed
  }
  num_steps = allocate_steps(num_steps);
  write_block_tables(batch);
  num_steps_in_flight_ += num_steps;
  return num_steps;
}

// Allocates blocks for the tokens of `num_steps` more steps and for the position after them,
// without preemption, or for half the steps, a quarter, ... Returns the steps that have blocks.
int32_t MultiStepRun::allocate_steps(int32_t num_steps) {
  const auto target = [&](const Sequence& sequence) {
    return std::min(sequence.num_computed + num_steps_in_flight_ + num_steps + 1, sequence.max_len);
  };
  for (; num_steps > 0; num_steps /= 2) {
    int64_t missing = 0;
    for (const Sequence* s : rows_) {
      if (s == nullptr) continue;
      const auto owned = static_cast<int32_t>(s->blocks.size());
      missing += std::max(blocks_.num_blocks_for(target(*s)) - owned, 0);
    }
    if (missing > blocks_.num_free()) continue;
    for (Sequence* s : rows_) {
      if (s != nullptr) check_invariant(blocks_.grow(*s, target(*s)), "free blocks were counted");
    }
    return num_steps;
  }
  return 0;
}

void MultiStepRun::write_block_tables(ScheduledBatch& batch) const {
  for (size_t row = 0; row < rows_.size(); ++row) {
    if (rows_[row] != nullptr) batch.write_block_table(static_cast<int32_t>(row), *rows_[row]);
  }
}

bool MultiStepRun::worth_extending() const {
  const auto live = static_cast<size_t>(
      std::count_if(rows_.begin(), rows_.end(), [](const Sequence* s) { return s != nullptr; }));
  return !stale_ && live > 0 && 2 * live >= rows_.size();
}

bool MultiStepRun::remove(const Sequence& sequence) {
  const auto row = std::find(rows_.begin(), rows_.end(), &sequence);
  if (row == rows_.end()) return false;
  *row = nullptr;
  return true;
}

}  // namespace s1
