#pragma once
/// @file
/// Classes of a study's workload, rare ones beside frequent ones: when each is learned, and what is
/// left of each in the end.

#include <string>
#include <vector>

#include "runtime/cli/study_figure.hpp"
#include "runtime/cli/study_noise.hpp"
#include "runtime/cli/study_results.hpp"
#include "runtime/cli/study_table.hpp"

namespace orthrus::cli {

/// Of the reporting runs of one series at one batch size: means over seeds, NaN where a run has
/// none.
struct SeriesClasses {
  struct Class {
    int number = 0;                 ///< 0: the most frequent
    double time = 0;                ///< steps to half of its last accuracy
    double loss = 0, accuracy = 0;  ///< at the end
    double lo = 0, hi = 0;          ///< of `value`, over runs
    /// The loss of a decile of tokens, the accuracy of a class that has no loss of its own.
    [[nodiscard]] double value() const;
  };
  std::string series;
  double batch = 0;
  bool deciles = false;  ///< of tokens; else classes
  std::size_t runs = 0;
  double ratio = 0;  ///< slowest over fastest
  std::vector<Class> classes;
  /// The most frequent and the rarest class along the examples: mean over runs that evaluated
  /// there.
  struct Curve {
    int number = 0;
    std::vector<runtime::report::Measured> points;
  };
  std::vector<Curve> curves;
};
/// Empty where no run has classes.
[[nodiscard]] std::vector<SeriesClasses> classes_of(const StudyResults& study,
                                                    const std::vector<NoiseRun>& runs);
[[nodiscard]] StudyTable classes_table(const std::vector<SeriesClasses>& all);
/// @param series  in the order of their colours
[[nodiscard]] std::vector<StudyFigure> class_figures(const std::vector<SeriesClasses>& all,
                                                     const std::vector<std::string>& series);

}  // namespace orthrus::cli
