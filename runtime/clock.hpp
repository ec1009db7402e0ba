#pragma once
/// @file
/// The clock of step reports.

#include <chrono>

namespace orthrus::runtime {

using Clock = std::chrono::steady_clock;

inline double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

}  // namespace orthrus::runtime
