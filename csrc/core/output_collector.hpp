// Collects output records (core_output.hpp) until they are read. Records of one sequence are joined
// meanwhile, so a reader pays for each look and not for each step.
//
// Steps with forced tokens stay records of their own. The reader decides when to look; the
// collector only reports what should not wait: the first output of a request, and the end of a
// sequence.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "types.hpp"

namespace s1 {

// Not thread-safe.
class OutputCollector {
 public:
  // The request of a sequence is the sequence's id without the lowest `sequence_bits` bits.
  explicit OutputCollector(int32_t sequence_bits) : sequence_bits_(sequence_bits) {}

  void open(int64_t request) { requests_.try_emplace(request); }
  void close(int64_t request) { requests_.erase(request); }
  // Requests that are open.
  size_t size() const { return requests_.size(); }

  // Adds the records of one step; those of requests that are not open are dropped. Returns the
  // requests that should be read at once. Throws std::invalid_argument if a record is cut off, and
  // std::bad_alloc; then it holds a part of the records, each whole, and the streams are broken.
  std::vector<int64_t> add(std::string_view records);

  // True if a request has output that may wait, since the last pop_pending().
  bool has_pending() const { return !pending_.empty(); }
  // Returns these requests.
  std::vector<int64_t> pop_pending();

  // What the sequences of a request gained since the last call, as records.
  std::string collect(int64_t request);

 private:
  // Records of one sequence, joined: the state of the last one, the tokens of all, the cached
  // prompt tokens of the first one.
  struct Joined {
    SeqId id;
    std::string head;
    std::string tokens;
    std::string marks;
    bool sampled;  // no token was forced
  };
  struct Request {
    bool begun = false;
    bool is_pending = false;
    std::vector<Joined> joined;  // in order of their first token
  };

  static void join(std::vector<Joined>& joined, Joined&& record);

  int32_t sequence_bits_;
  std::unordered_map<int64_t, Request> requests_;
  std::vector<int64_t> pending_;
};

}  // namespace s1
