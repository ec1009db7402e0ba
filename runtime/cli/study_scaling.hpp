#pragma once
/// @file
/// What the times of a study's trials say: speed-up and efficiency over ranks beside what the
/// planner foretold, and the cost of messages.

#include <limits>
#include <optional>
#include <orthrus/studies/fit.hpp>
#include <string>
#include <vector>

#include "runtime/cli/study_results.hpp"
#include "runtime/cli/study_table.hpp"

namespace orthrus::cli {

/// The times of one trial. Numbers that are not there are NaN.
struct ScalingPoint {
  double ranks = 0, elements = 0;
  double optimizer_ms = 0, lo = 0, hi = 0;  ///< median of the slowest rank's, and its interval
  double step_ms = 0, predicted_ms = 0;
  double bytes = 0, predicted_bytes = 0;          ///< sent per step, by the rank that sends most
  double imbalance = 0, predicted_imbalance = 0;  ///< most over mean, of work over ranks
  bool oversubscribed = false;
  struct Phase {
    std::string name;
    double ms = 0, predicted_ms = 0;
    /// Is it of waiting for others?
    bool waits = false;
  };
  std::vector<Phase> phases;
  /// Work of the busiest rank over the bytes it moves, and how fast it was; under a roof of memory
  /// or of the network.
  struct Work {
    std::string name;
    double intensity = 0, flops_per_s = 0, attainable = 0;
    bool network = false;
  };
  std::vector<Work> works;
  double peak_flops_per_s = 0, memory_bytes_per_s = 0, network_bytes_per_s = 0;  ///< measured
  /// Against the base; NaN where one of both was oversubscribed: times of waiting for a core.
  double speedup = std::numeric_limits<double>::quiet_NaN();
  double efficiency = std::numeric_limits<double>::quiet_NaN();
  /// Karp and Flatt's serial fraction; NaN at the base, and of weak scaling.
  double serial = std::numeric_limits<double>::quiet_NaN();
  /// 1 − waiting/optimizer_ms.
  [[nodiscard]] double overlap() const;
};
/// Trials that differ in their ranks, and in what grows with them.
struct ScalingSeries {
  std::string series;
  bool weak = false;                      ///< the model grows: T(p₀)/T(p) is the efficiency
  std::vector<ScalingPoint> points;       ///< ranks ascend; the first is the base
  [[nodiscard]] bool suppressed() const;  ///< has some point no efficiency?
};
/// Series of the trials that measured their times (`execution.exclusive`); empty without any.
[[nodiscard]] std::vector<ScalingSeries> scaling_of(const StudyResults& study);

[[nodiscard]] StudyTable scaling_table(const std::vector<ScalingSeries>& all);
/// Times, bytes and imbalance beside the planner's.
[[nodiscard]] StudyTable planned_table(const std::vector<ScalingSeries>& all);
/// Milliseconds of each phase: measured, predicted, and what is left between them.
[[nodiscard]] StudyTable phases_table(const std::vector<ScalingSeries>& all);

/// Work under its roofs.
[[nodiscard]] StudyTable roofline_table(const std::vector<ScalingSeries>& all);

/// Times of one collective on one number of ranks (`orthrus bench comm --metrics`), and Hockney's
/// law of a ring through them.
struct MessageSeries {
  std::string collective;
  int ranks = 0;
  std::vector<double> bytes, seconds;  ///< of the whole buffer, ascending; the least of several
  studies::CollectiveShape shape;
  std::optional<studies::MessageFit> fit;  ///< from five sizes on
  [[nodiscard]] std::string name() const;
  /// Bus bandwidth, as nccl-tests has it: bytes per second that every link carries.
  [[nodiscard]] double bus_bytes_per_s(double bytes, double seconds) const;
};
/// Series of trials with parameters `collective`, `ranks` and `bytes`; empty without any.
[[nodiscard]] std::vector<MessageSeries> messages_of(const StudyResults& study);
[[nodiscard]] StudyTable messages_table(const std::vector<MessageSeries>& all);

}  // namespace orthrus::cli
