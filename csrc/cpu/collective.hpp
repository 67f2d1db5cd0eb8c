// How the ranks of a model, processes on one machine, add up and gather what each has computed: in
// memory that all have mapped.
//
// Every rank makes the same calls with the same sizes in the same order. Long arrays pass in pieces
// of a slot's size. For each piece a rank fills its own slot, says so, waits until all have said
// so, and reads the slots of all. Slots are double: who fills the one of piece n + 2 has seen all
// ranks come to piece n + 1, so all have read piece n.
//
// Sums are in float32 in the order of ranks, rounded once: all ranks get the same bits.

#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "ops.hpp"

namespace s1::cpu {

// Another rank has not come: it has died, or it hangs.
struct CollectiveError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Collective {
 public:
  static constexpr int kMaxRanks = 64;

  // What so many ranks need; zeros at first, aligned to cache lines.
  static int64_t memory_bytes(int ranks);

  // The memory must outlive this object and every plan with a call of it.
  Collective(Address memory, int rank, int ranks);

  // out [count] = sum of x [count] over ranks, plus what out holds if `add`; x may be out.
  void all_reduce(int dtype, Address x, Address out, int64_t count, bool add);

  // out [rows, ranks * row_bytes] = x [rows, row_bytes] of all ranks side by side, on the first
  // rank; the others' out is not touched.
  void gather(Address x, Address out, int64_t rows, int64_t row_bytes);

  // All ranks that wait, or will, get a CollectiveError; for any thread.
  void abort();

 private:
  // One cache line each.
  struct alignas(64) Flag {
    std::atomic<uint32_t> value;
  };
  struct Header {
    Flag aborted;
    Flag pieces[kMaxRanks];  // that a rank has filled its slot with
  };
  static_assert(std::atomic<uint32_t>::is_always_lock_free);

  static constexpr int64_t kSlotBytes = 1 << 18;  // two ranks' slots fit the second-level cache

  char* slot(int rank) const;
  void fill_slot(const char* from, int64_t bytes);
  void meet();
  void await(const Flag& other) const;
  void place(const char* from, char* out, int64_t begin, int64_t end, int64_t row_bytes) const;

  Header* header_;
  char* slots_;  // [2][ranks][kSlotBytes]
  int rank_, ranks_;
  uint32_t piece_ = 0;  // the one in work
};

}  // namespace s1::cpu
