// Decode steps on the CPU without Python: schedule, replay, sample, update, collect.
//
// Connects scheduler, recorded steps and sampler, which do not know each other, and owns none of
// them. It decides steps that sample every token they compute and whose size is recorded. Every
// other step is left to the caller: one that admits sequences, has prompt tokens, or samples a row
// by Python.

#pragma once

#include <atomic>
#include <span>
#include <string>
#include <vector>

#include "core/scheduler.hpp"
#include "cpu/logprob_records.hpp"
#include "cpu/recorded_step.hpp"
#include "cpu/sampler.hpp"

namespace s1 {

class DecodeLoop {
 public:
  // `needs_python`: by req_index, nonzero for sequences that only Python can sample. The caller
  // owns all arguments.
  DecodeLoop(ScheduledBatch& batch, const cpu::GraphTable& graphs, cpu::Sampler& sampler,
             const uint8_t* needs_python);

  // Takes decode steps until one reports something (Scheduler::events()) or has log-probabilities,
  // `seconds` or the time to the next deadline (Scheduler::schedule()) have passed, or interrupt()
  // was called; at least one. Returns true. `masks`: by req_index, the bitmask of the tokens that a
  // grammar allows next, null: all; not empty: a single step, because the next one has other masks.
  // Returns false if the caller has to take the step that is planned now, after none or more steps
  // that reported nothing: admitted() tells who entered it, and Scheduler::update() must follow,
  // unless the plan is empty. An exception leaves the scheduler in its step, as one between
  // schedule() and update() would.
  bool run(Scheduler& scheduler, double seconds, double time_to_deadline,
           std::span<const uint8_t* const> masks = {});

  int32_t max_rows() const { return batch_.max_rows; }
  int64_t vocab_size() const { return sampler_.vocab_size(); }

  // Of the last run() that returned false.
  const std::vector<SeqId>& admitted() const { return *admitted_; }
  // Records (core_output.hpp) of the last step of a run() that returned true.
  const std::string& records() const { return records_; }
  // Log-probabilities (logprob_records.hpp) of the last step that was computed here.
  const std::string& logprobs() const { return logprobs_.bytes(); }

  // Ends the present run(), or the next one, after its step. Any thread may call it.
  void interrupt() { interrupted_.store(true, std::memory_order_relaxed); }

 private:
  bool needs_python(const Scheduler& scheduler) const;
  void sample(const cpu::Graph& graph, std::span<const uint8_t* const> masks);

  ScheduledBatch& batch_;
  const cpu::GraphTable& graphs_;
  cpu::Sampler& sampler_;
  const uint8_t* needs_python_;
  const std::vector<SeqId>* admitted_ = nullptr;
  std::vector<int64_t> tokens_;          // sampled in this step
  std::vector<const uint8_t*> allowed_;  // bitmasks of its samples
  cpu::LogprobRecords logprobs_;
  std::string records_;
  std::atomic<bool> interrupted_ = false;
};

}  // namespace s1
