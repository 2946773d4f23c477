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

#include "xla/ffi/api/ffi.h"

namespace qjax::cpu {

// What a thread that sleeps takes to wake up is more than most tasks take: before it sleeps it looks for so long.
constexpr std::chrono::microseconds kAwake{50};

// Runs f(i) for i in [0, tasks), the caller among those who do. Whoever is free takes the next i, and the caller waits
// for tasks that have begun only: a pool whose threads are all busy, perhaps waiting like this one, delays nothing.
template <typename F>
static void ParallelFor(xla::ffi::ThreadPool& pool, int64_t tasks, const F& f) {
  struct Shared {
    explicit Shared(int64_t tasks, const F* f) : tasks(tasks), f(f) {}
    const int64_t tasks;
    const F* f;  // the caller's: read only while a task is not done
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void Work() {
      int64_t finished = 0;
      for (int64_t i; (i = next.fetch_add(1)) < tasks; ++finished) (*f)(i);
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
  std::shared_ptr<Shared> shared(new Shared(tasks, &f));  // make_shared has a symbol that libraries share
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  const auto all_done = [&] { return shared->done == tasks; };
  for (const auto since = std::chrono::steady_clock::now(); std::chrono::steady_clock::now() - since < kAwake;)
    if (all_done()) return;
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, all_done);
}

}  // namespace qjax::cpu

#endif  // QJAX_XLA_FFI_CPU_PARALLEL_H_
