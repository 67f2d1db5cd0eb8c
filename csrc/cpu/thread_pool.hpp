// The threads that the CPU kernels share: persistent workers that sleep when there is nothing to
// do.
//
// Knows nothing of tensors. A job is a range of items cut into chunks of a fixed size; the caller
// and the awake workers claim chunks until none is left. What a chunk computes must not depend on
// who claims it, so results are the same for every number of threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace s1::cpu {

class ThreadPool {
 public:
  // The pool of this process; it starts with one thread, the caller's. It is never destroyed:
  // sleeping workers end with the process, also with a forked one that has none.
  static ThreadPool& instance();

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads that work on a job, the caller's included.
  int size() const { return size_.load(std::memory_order_relaxed); }
  void resize(int size);

  // Calls task(begin, end) for consecutive ranges that cover [0, items), each a multiple of `chunk`
  // long but the last; returns when all are done. One chunk, a pool of one thread, and a pool that
  // is busy (with the job of another thread, or around a nested call) make one range on the calling
  // thread. Tasks must not throw.
  template <typename Task>
  void parallel_for(int64_t items, int64_t chunk, const Task& task) {
    const Job job{[](const void* context, int64_t begin, int64_t end) {
                    (*static_cast<const Task*>(context))(begin, end);
                  },
                  &task, items, chunk};
    run(job);
  }

 private:
  struct Job {
    void (*call)(const void* context, int64_t begin, int64_t end) = nullptr;
    const void* context = nullptr;
    int64_t items = 0;
    int64_t chunk = 1;
  };

  ThreadPool() = default;
  void run(const Job& job);
  void run_chunks(const Job& job);
  void work();
  void await_workers();
  void stop_workers();
  void release();

  std::vector<std::thread> workers_;
  std::atomic<int> size_ = 1;
  std::atomic_flag busy_;  // set by the thread whose job runs

  Job job_;  // written only while no worker is inside
  std::atomic<int64_t> next_item_ = 0;
  std::atomic<uint32_t> epoch_ = 0;  // grows with every job: what idle workers wait on
  std::atomic<bool> open_ = false;   // may workers enter the job?
  std::atomic<int32_t> inside_ = 0;  // workers that are, or are about to find out
  std::atomic<bool> stopping_ = false;
};

}  // namespace s1::cpu
