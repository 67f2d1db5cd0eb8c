// Decode steps on the CPU without Python: schedule, replay, sample, update, collect.
//
// Connects scheduler, recorded steps and sampler, which do not know each other, and owns none of
// them. It decides steps that sample every token they compute and whose size is recorded. Every
// other step is left to the caller: one that admits sequences, has prompt tokens, or samples a row
// by Python.

#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "core/scheduler.hpp"
#include "cpu/recorded_step.hpp"
#include "cpu/sampler.hpp"

namespace s1 {

class DecodeLoop {
 public:
  // `needs_python`: by req_index, nonzero for sequences that only Python can sample. The caller
  // owns all arguments.
  DecodeLoop(ScheduledBatch& batch, const cpu::GraphTable& graphs, cpu::Sampler& sampler,
             const uint8_t* needs_python);

  // Takes decode steps until one reports something (Scheduler::events()), `seconds` or the time to
  // the next deadline (Scheduler::schedule()) have passed, or interrupt() was called; at least one.
  // Returns true. Returns false if the caller has to take the step that is planned now, after none
  // or more steps that reported nothing: admitted() tells who entered it, and Scheduler::update()
  // must follow, unless the plan is empty. An exception leaves the scheduler in its step, as one
  // between schedule() and update() would.
  bool run(Scheduler& scheduler, double seconds, double time_to_deadline);

  // Of the last run() that returned false.
  const std::vector<SeqId>& admitted() const { return *admitted_; }
  // Records (core_output.hpp) of the last step of a run() that returned true.
  const std::string& records() const { return records_; }

  // Ends the present run(), or the next one, after its step. Any thread may call it.
  void interrupt() { interrupted_.store(true, std::memory_order_relaxed); }

 private:
  bool needs_python(const Scheduler& scheduler) const;
  void sample(const cpu::Graph& graph);

  ScheduledBatch& batch_;
  const cpu::GraphTable& graphs_;
  cpu::Sampler& sampler_;
  const uint8_t* needs_python_;
  const std::vector<SeqId>* admitted_ = nullptr;
  std::vector<int64_t> tokens_;  // sampled in this step
  std::string records_;
  std::atomic<bool> interrupted_ = false;
};

}  // namespace s1
