#pragma once
/// @file
/// The loss of a study's runs over batch size and steps as one law (arXiv 2607.01487): all
/// evaluations of all reported runs, not only when they reach a target.

#include <functional>
#include <optional>
#include <orthrus/studies/fit.hpp>
#include <string>
#include <vector>

#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

/// L = E + B/M^β + C/K^γ through one series.
struct SeriesLaw {
  /// RMS of ln L from which on a law of the loss is doubted.
  static constexpr double misses = 0.03;

  std::string series;
  studies::LossLaw law;
  std::size_t runs = 0;
  std::vector<studies::LossCell> cells;  ///< that it was fitted to
  double least_batch = 0, largest_batch = 0;
  double examples = 0;    ///< D of the longest run
  double best_batch = 0;  ///< M*(D)
  /// Of runs drawn anew within each batch size; nothing where one of them has a single run.
  std::optional<studies::Interval> batch_exponent, steps_exponent, best_exponent, best;
  [[nodiscard]] bool measured() const {
    return best_batch >= least_batch && best_batch <= largest_batch;
  }
};

/// One run: its evaluations as cells, at eight numbers of steps a factor of 1.5 apart, the last one
/// its end. Evaluations of a run move together, so that runs are drawn, never evaluations.
struct LawRun {
  double batch = 0;
  std::vector<studies::LossCell> cells;
};
/// Of a trial at a constant rate. @param metric  key of its evaluations
LawRun law_run(const StudyResults& study, const StudyTrial& trial, const std::string& metric);

/// Nothing with fewer than three batch sizes, or fewer cells than twice the parameters.
/// @param resamples  of the intervals; a fit each
std::optional<SeriesLaw> fit_law(const std::string& series, const std::vector<LawRun>& runs,
                                 int resamples, double level);

}  // namespace orthrus::cli
