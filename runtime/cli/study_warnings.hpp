#pragma once
/// @file
/// What to know before believing a study: the warnings of its analysis.

#include <functional>
#include <orthrus/studies/cells.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cli/study_analysis.hpp"
#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

/// "16, 32, 64"
[[nodiscard]] std::string numbers_text(const std::vector<double>& values);

class Warnings {
 public:
  explicit Warnings(std::vector<StudyWarning>& list) : list_(list) {}
  void add(const char* kind, std::string text) { list_.push_back({kind, std::move(text)}); }
  /// One line for all batches of a series that `wrong` holds for.
  void batches(const char* kind, const std::vector<studies::Cell>& cells, const std::string& what,
               const std::function<bool(const studies::Cell&)>& wrong);

 private:
  std::vector<StudyWarning>& list_;
};

/// Ends a factor of four apart or more: nothing was measured.
[[nodiscard]] bool wide(const studies::Interval& interval);

/// Optimizers and batch sizes of the file that no trial has finished at.
void warn_of_missing_cells(const StudyResults& study, const StudyAnalysis& analysis,
                           Warnings& warn);
void warn_of_cells(const StudyResults& study, const StudyAnalysis& analysis, Warnings& warn);
/// What only lines of results say. @param keys  as series_keys gives them
void warn_of_trials(const StudyResults& study, const StudyAnalysis& analysis,
                    const std::vector<std::string>& keys, Warnings& warn);
void warn_of_fit(const SeriesSteps& fit, Warnings& warn);

}  // namespace orthrus::cli
