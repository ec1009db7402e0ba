#pragma once
/// @file
/// How a rank waits for others when nothing wakes it: it asks again and again, out of the others'
/// way.

#include <chrono>
#include <thread>

namespace orthrus::comm {

/// Calls `test` until it answers true or `timeout_s` has passed (0: for ever). @return the last
/// answer.
///
/// Ranks often share cores, so the core is offered to others after a few tries; after 50 ms a pause
/// follows every 64 tries. Longer pauses would starve messages that only move while somebody asks.
template <class Test>
bool wait_until(Test&& test, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 8; ++i) {
    if (test()) return true;
  }
  const Clock::time_point begin = Clock::now();
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (test()) return true;
      std::this_thread::yield();
    }
    const std::chrono::duration<double> waited = Clock::now() - begin;
    if (timeout_s > 0 && waited.count() >= timeout_s) return test();
    if (waited.count() > 0.05) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace orthrus::comm
