// Steps that are recorded once and replayed: the operations of a forward pass as a list of calls,
// with nothing between them.
//
// Operations work on fixed addresses and sizes and read what changes (token ids, positions, block
// tables) from memory when they run, so a list made for one step serves every step of its sizes.

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

  // From here on, operations of this thread are added to `plan` as well as done; null: no more.
  static void record_into(std::shared_ptr<RecordedStep> plan);

  // Does it, and records it if this thread records.
  template <typename Call>
  static void call_and_record(Call call) {
    if (recording_ != nullptr) recording_->operations_.push_back(call);
    call();
  }

 private:
  static thread_local std::shared_ptr<RecordedStep> recording_;
  std::vector<Operation> operations_;
};

// An operation in the form that RecordedStep::call_and_record wants: Recorded<&f>::call has f's own
// signature.
template <auto kOperation>
struct Recorded;

template <typename... Args, void (*kOperation)(Args...)>
struct Recorded<kOperation> {
  static void call(Args... args) {
    RecordedStep::call_and_record([=] { kOperation(args...); });
  }
};

}  // namespace s1::cpu
