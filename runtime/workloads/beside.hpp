#pragma once
/// @file
/// Work on a thread of its own that says, as it goes, what the calling thread is to do.

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace orthrus::workloads {

/// Calls `work(say)` on another thread, and here `hear(id)` for every `say(id)`, in their order,
/// while the work goes on. `say` may be called by any thread, until `work` returns. @throws what
/// `hear` (which then hears no more) or else `work` threw, when the work has ended.
template <class Work>
void run_beside(Work&& work, const std::function<void(int)>& hear) {
  std::mutex mutex;  // of all that follows
  std::condition_variable news;
  std::deque<int> said;
  bool over = false;
  std::exception_ptr failure;

  std::thread thread([&] {
    std::exception_ptr problem;
    try {
      work([&](int id) {
        const std::lock_guard lock(mutex);
        said.push_back(id);
        news.notify_one();
      });
    } catch (...) {
      problem = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    failure = problem;
    over = true;
    news.notify_one();
  });

  std::exception_ptr unheard;
  for (std::unique_lock lock(mutex);;) {
    news.wait(lock, [&] { return over || !said.empty(); });
    if (said.empty()) break;
    const int id = said.front();
    said.pop_front();
    if (unheard) continue;
    lock.unlock();
    try {
      hear(id);
    } catch (...) {
      unheard = std::current_exception();
    }
    lock.lock();
  }
  thread.join();
  if (unheard) std::rethrow_exception(unheard);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace orthrus::workloads
