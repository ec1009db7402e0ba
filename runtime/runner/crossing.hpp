#pragma once
/// @file
/// When a loss reaches its target.

#include <cmath>

namespace orthrus::runner {

/// The step at which a falling loss crosses `target`, between its evaluations at step0 (above) and
/// step1 (at or below): linear in log loss and log step, and in either itself where it has no
/// logarithm. In (step0, step1].
[[nodiscard]] inline double crossing(double step0, double loss0, double step1, double loss1,
                                     double target) {
  const bool logs = loss1 > 0 && target > 0;
  const double part = logs ? std::log(loss0 / target) / std::log(loss0 / loss1)
                           : (loss0 - target) / (loss0 - loss1);
  return step0 > 0 ? step0 * std::pow(step1 / step0, part) : step1 * part;
}

}  // namespace orthrus::runner
