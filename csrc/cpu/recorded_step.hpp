// A step as a list of calls: the operations of a forward pass, recorded and then replayed.
//
// Operations have fixed addresses and sizes. They read changing data (token ids, positions, block
// tables) from memory when they run, so a recorded step serves every step of the same sizes.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
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

// A recorded step, and the logits [rows, stride] that it writes.
struct Graph {
  std::shared_ptr<const RecordedStep> step;
  float* logits;
  int64_t stride;
};

// Graphs by (tokens, rows).
class GraphTable {
 public:
  void add(int64_t tokens, int64_t rows, Graph graph) {
    graphs_[{tokens, rows}] = std::move(graph);
  }
  void remove(int64_t tokens, int64_t rows) { graphs_.erase({tokens, rows}); }
  void clear() { graphs_.clear(); }

  // Null: there is none. Valid until the graph is removed.
  const Graph* find(int64_t tokens, int64_t rows) const {
    const auto entry = graphs_.find({tokens, rows});
    return entry == graphs_.end() ? nullptr : &entry->second;
  }

 private:
  std::map<std::pair<int64_t, int64_t>, Graph> graphs_;
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
