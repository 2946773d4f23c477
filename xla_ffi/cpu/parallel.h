// Work shared with XLA's own pool of threads.
#ifndef QJAX_XLA_FFI_CPU_PARALLEL_H_
#define QJAX_XLA_FFI_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace qjax::cpu {

// What a thread that sleeps takes to wake up is more than most tasks take: before it sleeps it looks for so long.
constexpr std::chrono::microseconds kAwake{50};

// Runs f(i) for i in [0, tasks), the caller among those who do. Each has a range of i, one after another in memory, and
// whoever is done with it takes from the others'. The caller waits for tasks that have begun only: a pool whose threads
// are all busy, perhaps waiting like this one, delays nothing.
template <typename F>
static void ParallelFor(xla::ffi::ThreadPool& pool, int64_t tasks, const F& f) {
  struct alignas(64) Range {  // a cache line, which the others seldom read
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    Shared(int64_t tasks, int64_t threads, const F* f) : tasks(tasks), f(f), ranges(threads) {
      for (int64_t r = 0; r < threads; ++r)
        ranges[r].next = r * tasks / threads, ranges[r].end = (r + 1) * tasks / threads;
    }
    const int64_t tasks;
    const F* f;  // the caller's: read only while a task is not done
    std::vector<Range> ranges;
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void Work(int64_t own) {
      int64_t finished = 0;
      for (size_t r = 0; r < ranges.size(); ++r) {
        Range& range = ranges[(own + r) % ranges.size()];
        for (int64_t i; (i = range.next.fetch_add(1)) < range.end; ++finished) (*f)(i);
      }
      if (finished == 0 || done.fetch_add(finished) + finished < tasks) return;
      std::lock_guard<std::mutex> lock(mutex);  // not between the caller's look and its sleep
      all_done.notify_one();
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  std::shared_ptr<Shared> shared(new Shared(tasks, helpers + 1, &f));  // make_shared has a symbol that libraries share
  for (int64_t i = 1; i <= helpers; ++i) pool.Schedule([shared, i] { shared->Work(i); });
  shared->Work(0);
  const auto all_done = [&] { return shared->done == tasks; };
  for (const auto since = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - since < kAwake;)
    if (all_done()) return;
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, all_done);
}

}  // namespace qjax::cpu

#endif  // QJAX_XLA_FFI_CPU_PARALLEL_H_
