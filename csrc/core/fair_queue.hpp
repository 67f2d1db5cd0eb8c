// The sequences that wait, and how much each client has been served.
//
// A client shares the engine fairly with others: an API key. Its counter grows by the tokens
// that are computed for it, prompts, thinking, branches and forced tokens alike; tokens found in
// the prefix cache are free, and tokens computed again after a preemption count once. Within a
// priority the next sequence is of a client of which nothing runs, else of the client with the
// smallest counter (virtual token counters: Sheng et al., Fairness in Serving Large Language
// Models, 2024). A client that comes back starts no lower than the smallest counter of those that
// are busy, so idle time earns no credit, and leaving repays no debt. An idle engine forgives all.
// Does not know blocks or rows.

#pragma once

#include <set>
#include <unordered_map>

#include "sequence.hpp"

namespace s1 {

struct Precedes {
  bool operator()(const Sequence* a, const Sequence* b) const { return a->precedes(*b); }
};

// The share of one client.
struct ClientShare {
  std::set<Sequence*, Precedes> waiting;
  int64_t served = 0;       // tokens
  int32_t num_live = 0;     // sequences that have not ended
  int32_t num_running = 0;  // of these
};

// True if `a` is computed before `b`, where both run: by priority, then by what their clients were
// served, then in their own order.
inline bool is_due_before(const Sequence& a, const Sequence& b) {
  if (a.priority != b.priority) return a.priority < b.priority;
  const int64_t served_a = a.share->served, served_b = b.share->served;
  return served_a != served_b ? served_a < served_b : a.precedes(b);
}

class FairQueue {
 public:
  // A new sequence of its client, which waits.
  void enter(Sequence& sequence);
  // A sequence, which neither waits nor runs, has ended.
  void leave(Sequence& sequence) { --sequence.share->num_live; }

  void insert(Sequence& sequence) { size_ += sequence.share->waiting.insert(&sequence).second; }
  void erase(Sequence& sequence) { size_ -= sequence.share->waiting.erase(&sequence); }
  bool contains(Sequence& sequence) const { return sequence.share->waiting.contains(&sequence); }
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }

  // The next sequence to run. The queue must not be empty.
  Sequence& front() const;

  // True if a waiting sequence comes before one that runs and has more to compute.
  static bool may_overtake(const Sequence& waiting, const Sequence& running);

  // Charges the client for what was computed since the last call.
  static void charge(Sequence& sequence);

  int32_t num_waiting(int64_t client) const {
    const auto share = shares_.find(client);
    return share == shares_.end() ? 0 : static_cast<int32_t>(share->second.waiting.size());
  }
  // The client's counter; 0 if it never came.
  int64_t tokens_served(int64_t client) const {
    const auto share = shares_.find(client);
    return share == shares_.end() ? 0 : share->second.served;
  }
  const std::unordered_map<int64_t, ClientShare>& shares() const { return shares_; }

 private:
  int64_t first_counter() const;

  std::unordered_map<int64_t, ClientShare> shares_;  // one per API key that ever came
  size_t size_ = 0;
};

}  // namespace s1
