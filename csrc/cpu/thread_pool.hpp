// The threads of the CPU kernels: persistent workers that sleep while there is no job.
//
// Knows no tensors. A job is a range of items in chunks of a fixed size; the caller and the awake
// workers claim chunks until none is left. A chunk's result must not depend on the thread that
// claims it, so results are the same for every number of threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace s1::cpu {

class ThreadPool {
 public:
  // The pool of this process; it starts with one thread, the caller's. It is never destroyed:
  // workers end with the process, and a forked process has none.
  static ThreadPool& instance();

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads of a job, the caller's included.
  int size() const { return size_.load(std::memory_order_relaxed); }
  void resize(int size);

  // Calls task(begin, end) for consecutive ranges that cover [0, items) and returns when all are
  // done. The length of each range but the last is a multiple of `chunk`. The calling thread runs
  // one range alone if there is one chunk, if the pool has one thread, or if the pool is busy (with
  // a job of another thread, or in a nested call). Tasks must not throw.
  template <typename Task>
  void parallel_for(int64_t items, int64_t chunk, const Task& task) {
    const Job job{[](const void* context, int64_t begin, int64_t end) {
                    (*static_cast<const Task*>(context))(begin, end);
                  },
                  &task, items, chunk};
    run_job(job);
  }

 private:
  struct Job {
    void (*call)(const void* context, int64_t begin, int64_t end) = nullptr;
    const void* context = nullptr;
    int64_t items = 0;
    int64_t chunk = 1;
  };

  ThreadPool() = default;
  void run_job(const Job& job);
  void run_chunks(const Job& job);
  void worker_loop();
  void await_workers();
  void stop_workers();
  void release();

  std::vector<std::thread> workers_;
  std::atomic<int> size_ = 1;
  std::atomic_flag busy_;  // set by the caller whose job runs

  Job job_;  // written only while no worker is inside
  std::atomic<int64_t> next_item_ = 0;
  std::atomic<uint32_t> epoch_ = 0;  // increases with every job; idle workers wait on it
  std::atomic<bool> open_ = false;   // workers may enter the job
  std::atomic<int32_t> inside_ = 0;  // workers in the job, or about to read open_
  std::atomic<bool> stopping_ = false;
};

}  // namespace s1::cpu
