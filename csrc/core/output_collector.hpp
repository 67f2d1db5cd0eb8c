// Records of steps (progress.hpp) on their way to whoever makes text of them: while nobody reads a
// sequence, what it gains is joined, so a reader pays for each time it looks and not for each step.
//
// Steps with forced tokens stay records of their own. Whoever reads decides when; the inbox only
// tells what should not wait: the beginning of a request, and the end of a sequence.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "types.hpp"

namespace s1 {

// Not copyable, not thread-safe.
class OutputCollector {
 public:
  // The request of a sequence is its id without the lowest `sequence_bits`.
  explicit OutputCollector(int32_t sequence_bits) : sequence_bits_(sequence_bits) {}

  void open(int64_t request) { requests_.try_emplace(request); }
  void close(int64_t request) { requests_.erase(request); }

  // Takes the records of one step; those of requests that are not open are dropped. Returns the
  // requests that should be read at once. Throws std::invalid_argument if these are no records.
  std::vector<int64_t> add(std::string_view records);

  // Has a request gained something since pop_pending that may wait?
  bool has_pending() const { return !news_.empty(); }
  // Those that have.
  std::vector<int64_t> pop_pending();

  // What a request's sequences gained since the last call, as records.
  std::string collect(int64_t request);

 private:
  // Records of one sequence as one: the last one's state, everybody's tokens; what was cached
  // is what the first one found.
  struct Joined {
    SeqId id;
    std::string head;
    std::string tokens;
    std::string marks;
    bool sampled;  // nothing of it was forced
  };
  struct Request {
    bool begun = false;
    bool in_news = false;
    std::vector<Joined> joined;  // in order of their first token
  };

  static void join(std::vector<Joined>& joined, Joined&& record);

  int32_t sequence_bits_;
  std::unordered_map<int64_t, Request> requests_;
  std::vector<int64_t> news_;
};

}  // namespace s1
