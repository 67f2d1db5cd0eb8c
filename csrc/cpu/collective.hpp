// Collectives among the ranks of a model, which are processes on one machine, in shared memory.
//
// Every rank makes the same calls with the same sizes in the same order. Long arrays are split into
// pieces of a slot's size. For each piece a rank fills its slot, publishes the piece's number,
// waits for all ranks to do the same, and reads all slots. Slots are double-buffered: a rank that
// fills the slot of piece n + 2 has seen all ranks at piece n + 1, so all have read piece n.
//
// Sums are in float32 in rank order, rounded once: all ranks get the same bits.

#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "ops.hpp"

namespace s1::cpu {

// Another rank did not reach the call: it died, or it hangs.
struct CollectiveError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Collective {
 public:
  static constexpr int kMaxRanks = 64;

  // Bytes of shared memory for that many ranks: zeros at first, aligned to cache lines.
  static int64_t memory_bytes(int ranks);

  // The memory must outlive this object and every recorded step that calls it.
  Collective(Address memory, int rank, int ranks);

  // out [count] = sum of x [count] over ranks, plus the old out if `add`; x may be out.
  void all_reduce(int dtype, Address x, Address out, int64_t count, bool add);

  // out [rows, ranks * row_bytes] = x [rows, row_bytes] of all ranks side by side. A rank whose out
  // is 0 receives nothing.
  void gather(Address x, Address out, int64_t rows, int64_t row_bytes);

  // Ranks that wait now or later get a CollectiveError. Any thread may call it.
  void abort();

 private:
  // One cache line each.
  struct alignas(64) Flag {
    std::atomic<uint32_t> value;
  };
  struct Header {
    Flag aborted;
    Flag pieces[kMaxRanks];  // number of the piece in each rank's slot
  };
  static_assert(std::atomic<uint32_t>::is_always_lock_free);

  static constexpr int64_t kSlotBytes = 1
                                        << 18;  // two ranks' slots fit into the second-level cache

  char* slot(int rank) const;
  void fill_slot(const char* from, int64_t bytes);
  void barrier();
  void await_piece(const Flag& other) const;
  void copy_rows(const char* from, char* out, int64_t begin, int64_t end, int64_t row_bytes) const;

  Header* header_;
  char* slots_;  // [2][ranks][kSlotBytes]
  int rank_, ranks_;
  uint32_t piece_ = 0;  // number of the current piece
};

}  // namespace s1::cpu
