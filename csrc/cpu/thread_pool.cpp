// How a job starts and ends.
//
// The caller publishes the job, opens it, wakes the workers and claims chunks itself. When no chunk
// is left it closes the job and waits only for the workers inside. A worker that wakes up later
// sees the closed job and sleeps again, so a late worker delays no job.
//
// Entering is `++inside_, then read open_`; closing is `open_ = false, then read inside_`. In
// sequentially consistent order at least one side sees the other, so no worker is inside a job that
// the caller considers done.

#include "thread_pool.hpp"

#include <algorithm>
#include <chrono>

#include "spin.hpp"

namespace s1::cpu {
namespace {

// Spinning time before a thread sleeps: longer than the serial work between two jobs of a step, and
// than the wake-up of a thread.
constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

ThreadPool& ThreadPool::instance() {
  static auto* pool = new ThreadPool;
  return *pool;
}

void ThreadPool::resize(int size) {
  while (busy_.test_and_set()) busy_.wait(true);
  if (size != this->size()) {
    stop_workers();
    size_ = std::max(size, 1);
    for (int i = 1; i < this->size(); ++i) workers_.emplace_back([this] { worker_loop(); });
  }
  release();
}

void ThreadPool::release() {
  busy_.clear();
  busy_.notify_one();
}

void ThreadPool::stop_workers() {
  stopping_ = true;
  ++epoch_;
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stopping_ = false;
}

void ThreadPool::run_job(const Job& job) {
  const bool alone = job.items <= job.chunk || size() == 1;
  if (alone || busy_.test_and_set()) {
    if (job.items > 0) job.call(job.context, 0, job.items);
    return;
  }
  job_ = job;
  next_item_.store(0, std::memory_order_relaxed);
  open_ = true;
  ++epoch_;
  epoch_.notify_all();
  run_chunks(job);
  open_ = false;
  await_workers();
  release();
}

void ThreadPool::run_chunks(const Job& job) {
  for (;;) {
    const int64_t begin = next_item_.fetch_add(job.chunk, std::memory_order_relaxed);
    if (begin >= job.items) return;
    job.call(job.context, begin, std::min(begin + job.chunk, job.items));
  }
}

void ThreadPool::await_workers() {
  if (spin_until([this] { return inside_ == 0; }, kSpin)) return;
  for (int32_t inside = inside_; inside != 0; inside = inside_) inside_.wait(inside);
}

void ThreadPool::worker_loop() {
  uint32_t seen = epoch_;
  while (!stopping_) {
    if (!spin_until([&] { return epoch_ != seen; }, kSpin)) epoch_.wait(seen);
    seen = epoch_;
    ++inside_;
    if (open_) run_chunks(job_);
    if (--inside_ == 0) inside_.notify_one();
  }
}

}  // namespace s1::cpu
