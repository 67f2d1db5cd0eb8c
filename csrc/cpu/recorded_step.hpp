// A step recorded once and replayed: the operations of a forward pass as a list of calls.
//
// Operations have fixed addresses and sizes. They read changing data (token ids, positions, block
// tables) from memory when they run, so a recorded step serves every step of the same sizes.

#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace s1::cpu {

class RecordedStep {
 public:
  using Operation = std::function<void()>;

  void replay() const {
    for (const Operation& operation : operations_) operation();
  }
  size_t size() const { return operations_.size(); }

  // From now on, operations of this thread are executed and added to `step`; null: stop recording.
  static void record_into(std::shared_ptr<RecordedStep> step);

  // Executes the call, and adds it to the step that this thread records, if any.
  template <typename Call>
  static void call_and_record(Call call) {
    if (recording_ != nullptr) recording_->operations_.push_back(call);
    call();
  }

 private:
  static thread_local std::shared_ptr<RecordedStep> recording_;
  std::vector<Operation> operations_;
};

// Recorded<&f>::call has the signature of f; it executes and records f.
template <auto kOperation>
struct Recorded;

template <typename... Args, void (*kOperation)(Args...)>
struct Recorded<kOperation> {
  static void call(Args... args) {
    RecordedStep::call_and_record([=] { kOperation(args...); });
  }
};

}  // namespace s1::cpu
