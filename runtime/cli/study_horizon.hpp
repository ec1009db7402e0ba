#pragma once
/// @file
/// How many examples the series of a study need, beside the laws of steps: the horizontal shift
/// between two losses (arXiv 2512.05620), and MLPerf's convergence points.

#include <optional>
#include <orthrus/studies/cells.hpp>
#include <orthrus/studies/horizon.hpp>
#include <span>
#include <string>
#include <vector>

#include "runtime/cli/study_loss_law.hpp"

namespace orthrus::cli {

/// L = E + A_s/D^β through the evaluations of two series at one batch size, E and β shared.
struct SeriesEfficiency {
  std::string numerator, denominator;
  double batch = 0;
  studies::DataEfficiency law;
  double ratio = 0;  ///< examples of the first for each of the second, at every loss alike
  /// Of runs drawn anew within each series; nothing where one of them has a single run.
  std::optional<studies::Interval> interval;
  std::size_t runs = 0;
  [[nodiscard]] bool conclusive() const {
    return interval && (interval->lo > 1 || interval->hi < 1);
  }
};
/// Nothing with fewer than five evaluations of a series.
/// @param resamples  of the interval; a fit each
std::optional<SeriesEfficiency> fit_efficiency(std::span<const LawRun> numerator,
                                               std::span<const LawRun> denominator, int resamples,
                                               double level);

/// Examples to the target per batch size, without the best and the worst run of each.
struct SeriesConvergence {
  struct Point {
    studies::ConvergencePoint at;
    std::size_t runs = 0;
    bool kept = true;  ///< false: slower than the line between its neighbours
    /// Slower than the reference at this batch, by a one-sided t-test at 5 %; nothing where the
    /// reference has no points around it, or there is one run.
    std::optional<bool> slower;
  };
  std::string series;
  std::vector<Point> points;
};
/// @param cells      of one series; censored ones are no points
/// @param reference  of which the kept points are compared with; empty: none is
SeriesConvergence convergence_of(const std::string& series, std::span<const studies::Cell> cells,
                                 std::span<const studies::Cell> reference);

}  // namespace orthrus::cli
