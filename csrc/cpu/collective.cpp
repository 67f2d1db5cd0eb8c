// How ranks wait for each other.
//
// The others usually arrive within microseconds, so a rank spins first. A late rank may need this
// core, so the rank then yields, and finally sleeps for short times. No rank waits for a wake-up,
// so a rank that dies blocks no other: a waiting rank sees `aborted`, or its timeout.

#include "collective.hpp"

#include <algorithm>
#include <cstring>
#include <thread>

#include "isa.hpp"
#include "spin.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr auto kSpin = 20us;
constexpr auto kYield = 2ms;  // after this, a nap is short beside the time already waited
constexpr auto kNap = 50us;
constexpr auto kTimeout = 120s;

constexpr int64_t kMinElements = 32768;  // of a sum, per thread
constexpr int64_t kMinBytes = 1 << 17;   // of a copy, per thread

}  // namespace

int64_t Collective::memory_bytes(int ranks) { return sizeof(Header) + 2 * ranks * kSlotBytes; }

Collective::Collective(Address memory, int rank, int ranks)
    : header_(pointer<Header>(memory)),
      slots_(pointer<char>(memory) + sizeof(Header)),
      rank_(rank),
      ranks_(ranks) {}

void Collective::all_reduce(int dtype, Address x, Address out, int64_t count, bool add) {
  const int64_t item = item_size(DType{dtype});
  const int64_t longest = kSlotBytes / item;
  for (int64_t begin = 0; begin < count; begin += longest) {
    const int64_t size = std::min(longest, count - begin);
    fill_slot(pointer<char>(x) + begin * item, size * item);
    barrier();
    const SumParts args{.parts = slot(0),
                        .stride = kSlotBytes / item,
                        .count = ranks_,
                        .out = pointer<char>(out) + begin * item,
                        .add = add};
    ThreadPool::instance().parallel_for(size, kMinElements, [&](int64_t first, int64_t last) {
      kernels(DType{dtype}).sum_parts(args, first, last);
    });
  }
}

void Collective::gather(Address x, Address out, int64_t rows, int64_t row_bytes) {
  const int64_t bytes = rows * row_bytes;
  for (int64_t begin = 0; begin < bytes; begin += kSlotBytes) {
    const int64_t end = std::min(begin + kSlotBytes, bytes);
    fill_slot(pointer<char>(x) + begin, end - begin);
    barrier();
    if (out == 0) continue;
    for (int rank = 0; rank < ranks_; ++rank) {
      copy_rows(slot(rank), pointer<char>(out) + rank * row_bytes, begin, end, row_bytes);
    }
  }
}

// Copies bytes [begin, end) of a rank's rows to their place in the rows of all ranks.
void Collective::copy_rows(const char* from, char* out, int64_t begin, int64_t end,
                           int64_t row_bytes) const {
  while (begin < end) {
    const int64_t row = begin / row_bytes, offset = begin % row_bytes;
    const int64_t size = std::min(row_bytes - offset, end - begin);
    std::memcpy(out + row * ranks_ * row_bytes + offset, from, static_cast<size_t>(size));
    from += size;
    begin += size;
  }
}

void Collective::abort() { header_->aborted.value.store(1, std::memory_order_release); }

char* Collective::slot(int rank) const {
  return slots_ + ((piece_ % 2) * ranks_ + rank) * kSlotBytes;
}

void Collective::fill_slot(const char* from, int64_t bytes) {
  ++piece_;
  char* to = slot(rank_);
  ThreadPool::instance().parallel_for(bytes, kMinBytes, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
}

void Collective::barrier() {
  header_->pieces[rank_].value.store(piece_, std::memory_order_release);
  for (int rank = 0; rank < ranks_; ++rank) await_piece(header_->pieces[rank]);
}

void Collective::await_piece(const Flag& other) const {
  const auto arrived = [&] {  // numbers wrap around
    const uint32_t behind = piece_ - other.value.load(std::memory_order_acquire);
    return static_cast<int32_t>(behind) <= 0;
  };
  if (spin_until(arrived, kSpin)) return;
  const auto begin = Clock::now();
  while (!arrived()) {
    const auto waited = Clock::now() - begin;
    if (header_->aborted.value.load(std::memory_order_acquire) != 0 || waited > kTimeout) {
      throw CollectiveError("another rank has not come: it has died, or it hangs");
    }
    if (waited < kYield) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }
}

}  // namespace s1::cpu
