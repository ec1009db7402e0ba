#pragma once
/// @file
/// When a metric reaches its target.

#include <cmath>

namespace orthrus::runner {

/// The step at which a metric crosses `target`, between its evaluations at step0 (not there yet)
/// and step1 (there): linear in its logarithm and that of the step, and in either itself where it
/// has none. In (step0, step1].
[[nodiscard]] inline double crossing(double step0, double value0, double step1, double value1,
                                     double target) {
  const bool logs = value0 > 0 && value1 > 0 && target > 0;
  const double part = logs ? std::log(value0 / target) / std::log(value0 / value1)
                           : (value0 - target) / (value0 - value1);
  return step0 > 0 ? step0 * std::pow(step1 / step0, part) : step1 * part;
}

}  // namespace orthrus::runner
