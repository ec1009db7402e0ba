#pragma once
/// @file
/// What the trials of a study come to: the analysis items of its file, the warnings, and the tables
/// that say both.

#include <nlohmann/json.hpp>
#include <orthrus/studies/cells.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cli/study_classes.hpp"
#include "runtime/cli/study_horizon.hpp"
#include "runtime/cli/study_loss_law.hpp"
#include "runtime/cli/study_noise.hpp"
#include "runtime/cli/study_results.hpp"
#include "runtime/cli/study_scaling.hpp"
#include "runtime/cli/study_table.hpp"

namespace orthrus::cli {

struct StudyWarning {
  std::string kind;  ///< edge_optimum, few_seeds, wide_interval, …
  std::string text;
};

/// A law of steps, as one item asks for it, through one series.
struct SeriesSteps {
  std::string series;
  studies::StepsQuestion question;
  studies::StepsStudy study;
  studies::StepsModel preferred = studies::StepsModel::hyper;  ///< by AICc
  std::vector<std::pair<studies::StepsModel, double>> rivals;  ///< AICc of each that can be fitted
};
struct SeriesRates {
  std::string series;
  studies::RateStudy study;
};
struct SeriesRatios {
  std::string numerator, denominator;
  std::vector<studies::TokenRatio> ratios;
};

/// Best rates of one optimizer at one batch, over the sizes of its model.
struct SeriesTransfer {
  std::string series, over;
  double batch = 0;
  std::vector<studies::RateShift> shifts;
};

/// The branches of one series, and the local critical batch they show.
struct SeriesBranches {
  std::string series;
  std::string loss;  ///< key of results.jsonl
  double fork_steps = 0, fork_batch = 0;
  std::vector<studies::Branch> branches;
  studies::LocalCbs local;
};

struct StudyAnalysis {
  studies::RateMetric metric = studies::RateMetric::loss;
  std::string metric_name;  ///< of the loss
  double target = 0;        ///< NaN: the study has none, and is judged by its losses
  std::vector<std::string> series;
  std::vector<studies::Cell> cells;
  std::vector<SeriesSteps> steps;
  std::vector<SeriesRates> rates;
  std::vector<SeriesRatios> ratios;
  std::vector<SeriesTransfer> transfers;
  std::vector<SeriesBranches> branches;
  std::vector<SeriesLaw> laws;
  std::vector<SeriesEfficiency> efficiencies;
  std::vector<SeriesConvergence> convergence;
  std::vector<SeriesNoise> noise;
  std::vector<SeriesClasses> classes;
  std::vector<ScalingSeries> scaling;
  std::vector<MessageSeries> messages;
  studies::SeedSpread spread;
  std::vector<StudyWarning> warnings;
  std::vector<StudyTable> verdicts;  ///< critical batch sizes, learning rates, token ratios
  StudyTable cell_table, trial_table;

  /// Cells of one series, in order of batch.
  [[nodiscard]] std::vector<studies::Cell> of(const std::string& series) const;
  [[nodiscard]] const char* value_name() const;  ///< "steps to target" or the loss
};

/// Runs analysis.items of the study (all that fit it where there are none). What cannot be fitted
/// is a warning, not an error.
/// @throws DataError  an item, or a setting of the analysis, that is not understood
[[nodiscard]] StudyAnalysis analyse(const StudyResults& study);

/// What the file asks for and no trial has an answer to: optimizers, and batch sizes of one.
[[nodiscard]] std::vector<StudyWarning> missing_cells(const StudyResults& study);

/// The documents of analysis/: name → lines of type `fit`, cells, warnings.
[[nodiscard]] nlohmann::ordered_json analysis_json(const StudyResults& study,
                                                   const StudyAnalysis& analysis);
/// The verdict tables and the warnings for a terminal.
[[nodiscard]] std::string verdict_text(const StudyResults& study, const StudyAnalysis& analysis);

}  // namespace orthrus::cli
