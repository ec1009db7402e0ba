#pragma once
/// @file
/// What a study file asks its analysis for, and how its trials are told apart.

#include <orthrus/studies/fit.hpp>
#include <string>
#include <vector>

#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

struct AnalysisItem {
  std::string fit;  ///< hyper, hyper_alpha, three_term_inv, auto, lr_exponent, local_cbs,
  ///< loss_law, convergence_points; or empty
  std::string compare;  ///< token_ratio, data_efficiency, lr_transfer: of
  std::string numerator, denominator;
  std::string reference;  ///< of convergence_points: an optimizer
  std::string over;       ///< of lr_transfer: the parameter that is the size
  std::vector<studies::CbsDefinition> definitions;
  double reference_batch = 256, overhead = 0.2;
  double epsilon = 0.01;
  bool tobit = true;                   ///< censored batches are inequalities of the fit
  bool noise_scale = false;            ///< among the definitions
  std::string loss = "smoothed_loss";  ///< of local_cbs
};
/// Those of analysis.items; without any, all that fit the study.
/// @throws DataError  one that is not understood
[[nodiscard]] std::vector<AnalysisItem> items_of(const StudyResults& study,
                                                 std::vector<StudyWarning>& warnings);
[[nodiscard]] studies::Bootstrap bootstrap_of(const StudyResults& study);

/// Did its trials leave a base run?
[[nodiscard]] bool is_branched(const StudyResults& study);

/// Parameters whose values are told apart: those that items name in `per`, and those that take
/// several values where all of these, batch, rate and seed are the same.
[[nodiscard]] std::vector<std::string> series_keys(const StudyResults& study);

struct SeriesName {
  std::string optimizer, rest;
  [[nodiscard]] std::string label() const;
};
[[nodiscard]] SeriesName series_name(const StudyTrial& trial, const std::vector<std::string>& keys);

}  // namespace orthrus::cli
