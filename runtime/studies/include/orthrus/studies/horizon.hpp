#pragma once
/// @file
/// What losses along the data say: critical batches per target, data efficiency of optimizers,
/// convergence points.
///
/// Sources: S. Bergsma et al., *Power Lines*, arXiv 2505.13738; S. Qiu et al., arXiv 2512.05620
/// (the horizontal shift between optimizers); MLPerf's convergence points,
/// github.com/mlcommons/logging. Lists that differ in length or are too short: ShapeError; numbers
/// that are not finite and positive: NumericError.

#include <orthrus/studies/fit.hpp>
#include <span>
#include <vector>

namespace orthrus::studies {

/// Losses of one batch size after so many examples.
struct LossCurve {
  double batch = 0;
  std::vector<double> examples, losses;
};

/// Examples to each target as a function of the batch: D = D_min·(1 + B/B_crit).
struct PowerLines {
  struct Target {
    double loss = 0;
    double least_examples = 0;  ///< D_min
    double critical_batch = 0;  ///< B_crit
    double rms_log = 0;
  };
  std::vector<PowerLaw> curves;  ///< loss against examples, of each batch
  std::vector<Target> targets;   ///< those that the curves of three batches or more reach
  PowerLaw growth;               ///< B_crit against D_min; with two targets or more
};
/// Each curve is a power law of the examples, which is inverted at every target between its largest
/// and least loss: no curve is continued beyond what was seen.
/// @param curves  batches ascend; two losses or more each
[[nodiscard]] PowerLines fit_power_lines(std::span<const LossCurve> curves,
                                         std::span<const double> targets);

/// L = E + A_s/D^β of several series of runs (optimizers, each at its best rate), E and β shared.
struct DataEfficiency {
  double irreducible = 0, exponent = 0;  ///< E, β
  std::vector<double> factors;           ///< A_s
  double rms_log = 0;
  /// Examples that series `s` needs for each that series `of` does, at every loss alike.
  [[nodiscard]] double ratio(std::size_t s, std::size_t of) const;
};
/// Huber's squares (δ = `huber`) of ln L, as `fit_loss`. @param series  two losses or more each
[[nodiscard]] DataEfficiency fit_data_efficiency(std::span<const LossCurve> series,
                                                 double huber = 1e-3);

/// The mean without the best and the worst; of fewer than three, of all.
[[nodiscard]] double olympic_mean(std::span<const double> values);

/// Examples to the target at one batch size.
struct ConvergencePoint {
  double batch = 0, examples = 0;
};
/// Without points that need more examples than the line between their neighbours that are left says
/// (over the batch), so that what is left is convex. @param points  batches ascend
[[nodiscard]] std::vector<ConvergencePoint> convergence_points(
    std::vector<ConvergencePoint> points);
/// At `batch`, on the line between its neighbours. @throws ConfigError  outside of them.
[[nodiscard]] double examples_at(std::span<const ConvergencePoint> points, double batch);
/// Do such runs need more than `examples`? By a one-sided t-test at level `alpha`; two runs or
/// more.
[[nodiscard]] bool slower_than(std::span<const double> runs, double examples, double alpha = 0.05);

}  // namespace orthrus::studies
