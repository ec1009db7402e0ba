#pragma once
/// @file
/// The gradient noise scale of a study's runs, from the probes that they left: against examples,
/// and near the target loss, where it is the critical batch size by definition `noise_scale`.

#include <orthrus/studies/noise.hpp>
#include <string>
#include <vector>

#include "runtime/cli/study_results.hpp"

namespace orthrus::cli {

/// Probes of one series in one geometry: "l2", "l1" or "nuc".
struct SeriesNoise {
  struct Bin {
    double examples = 0;  ///< geometric mean of its probes'
    std::size_t probes = 0;
    studies::NoiseScale::Value value;
  };
  std::string series, geometry;
  std::size_t trials = 0;
  std::vector<Bin> bins;  ///< half octaves of examples, ascending
  /// Of the probes within an octave of the examples at which their run reached the target; without
  /// a target, of the second half of the runs.
  Bin near;
  bool equal_splits = true;  ///< of all probes; in dual norms the scale depends on how many
};

/// One that the target was or was not reached by, and the series it belongs to.
struct NoiseRun {
  const StudyTrial* trial = nullptr;
  std::string series;
};

/// Numerators and denominators are summed over probes and divided then (l2). Lines of dual norms
/// have the ratio alone, whose signal cannot vanish but contains noise/B: its mean, of the largest
/// batch only. Intervals are of blocks of 5 probes.
[[nodiscard]] std::vector<SeriesNoise> noise_of_runs(const StudyResults& study,
                                                     const std::vector<NoiseRun>& runs);

}  // namespace orthrus::cli
