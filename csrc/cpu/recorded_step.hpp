// A step as a list of calls: the operations of a forward pass, recorded and then replayed.
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

  // From now on, operations of this thread are added to `step` and not executed; null: executed.
  static void record_into(std::shared_ptr<RecordedStep> step);

  // Adds the call to the step that this thread records. False if it records none.
  template <typename Call>
  static bool record(const Call& call) {
    if (recording_ == nullptr) return false;
    recording_->operations_.push_back(call);
    return true;
  }

 private:
  static thread_local std::shared_ptr<RecordedStep> recording_;
  std::vector<Operation> operations_;
};

// Recorded<&f>::call has the signature of f; it records f, or executes it.
template <auto kOperation>
struct Recorded;

template <typename... Args, void (*kOperation)(Args...)>
struct Recorded<kOperation> {
  static void call(Args... args) {
    const auto operation = [=] { kOperation(args...); };
    if (!RecordedStep::record(operation)) operation();
  }
};

}  // namespace s1::cpu
