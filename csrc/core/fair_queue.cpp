#include "fair_queue.hpp"

#include <algorithm>
#include <limits>

namespace s1 {

void FairQueue::enter(Sequence& sequence) {
  ClientShare& share = shares_[sequence.client];
  sequence.share = &share;
  insert(sequence);  // may throw, so first
  if (share.num_live == 0) share.served = std::max(share.served, first_counter());
  ++share.num_live;
}

// The counter at which a client begins: the smallest of those that are busy; of all, the largest,
// if none is.
int64_t FairQueue::first_counter() const {
  int64_t smallest = std::numeric_limits<int64_t>::max();
  int64_t largest = 0;
  for (const auto& [client, share] : shares_) {
    if (share.num_live > 0) smallest = std::min(smallest, share.served);
    largest = std::max(largest, share.served);
  }
  return std::min(smallest, largest);
}

Sequence& FairQueue::front() const {
  Sequence* first = nullptr;
  const auto comes_before = [](const Sequence& a, const Sequence& b) {
    if (a.priority != b.priority) return a.priority < b.priority;
    const bool runs_a = a.share->num_running > 0, runs_b = b.share->num_running > 0;
    return runs_a != runs_b ? runs_b : is_due_before(a, b);
  };
  for (const auto& [client, share] : shares_) {
    if (share.waiting.empty()) continue;
    Sequence* head = *share.waiting.begin();
    if (first == nullptr || comes_before(*head, *first)) first = head;
  }
  check_invariant(first != nullptr, "front() of an empty queue");
  return *first;
}

bool FairQueue::may_overtake(const Sequence& waiting, const Sequence& running) {
  if (waiting.priority != running.priority) return waiting.priority < running.priority;
  return waiting.share->served < running.share->served;
}

void FairQueue::charge(Sequence& sequence) {
  const int32_t new_tokens = sequence.num_computed - sequence.num_charged;
  if (new_tokens <= 0) return;
  sequence.share->served += new_tokens;
  sequence.num_charged = sequence.num_computed;
}

}  // namespace s1
