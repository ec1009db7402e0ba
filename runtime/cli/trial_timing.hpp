#pragma once
/// @file
/// What a trial that measures time says of its steps.

#include <vector>

#include "runtime/cli/training.hpp"
#include "runtime/plan.hpp"
#include "runtime/runner/identity.hpp"

namespace orthrus::cli {

/// Of every step, on this rank.
class TrialTiming {
 public:
  /// @param late_s  after the moment at which all ranks were to begin it
  void add(double step_ms, const StepTimes& optimizer, double bytes_max, double late_s = 0);
  /// Is the 95 % interval of the median of the optimizer's times, those of `summary`, below `share`
  /// of it? Of 30 steps or more after the first five; looked at every fifth step. Collective.
  [[nodiscard]] bool settled(Communicator& ranks, double share) const;
  /// Of each step the slowest rank's times; of these, after the first five (which pay for page
  /// faults and plans of libraries), medians with 95 % intervals of the median, and 5 % and 95 %
  /// quantiles; the phases of the optimizer's part; the planner's prediction of it on the machine
  /// of the configuration's profile, of all and of the phases; most over mean of the ranks' work;
  /// whether some machine has more ranks than processors; how late the last rank began, the median
  /// of the steps. Collective.
  [[nodiscard]] runner::Json summary(Training& training) const;

 private:
  [[nodiscard]] runner::Json roofline(Training& training, const runtime::Plan& plan) const;
  /// All numbers of all steps, each the slowest rank's.
  [[nodiscard]] std::vector<double> slowest(Communicator& ranks) const;

  std::vector<std::vector<double>> steps_;  // ms, in the order of `names`
  std::vector<double> late_;                // seconds
  double bytes_max_ = 0;
};

/// The value at the q-th of the sorted values, 0 ≤ q ≤ 1; NaN of none.
[[nodiscard]] double quantile(std::vector<double> values, double q);
/// Order statistics between which the median lies with 95 %: ranks (n ∓ 1.96·√n)/2, which need no
/// distribution (T. Hoefler and R. Belli, SC'15).
struct MedianInterval {
  double lo = 0, hi = 0;
};
[[nodiscard]] MedianInterval median_interval(std::vector<double> values);

}  // namespace orthrus::cli
