#pragma once
/// @file
/// Small experiments with known results: published numbers and closed forms beside what comes out
/// here. Deterministic, in double; seconds each, or minutes where they are slow.

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::studies {

enum class Relation : std::uint8_t { about, at_most, at_least };

/// One number beside the one expected.
struct Row {
  std::string quantity;
  double value = 0, expected = 0;
  double tolerance = 0;  ///< absolute
  Relation relation = Relation::about;

  [[nodiscard]] bool holds() const noexcept {
    const double over = value - expected;
    if (relation == Relation::at_most) return over <= tolerance;
    if (relation == Relation::at_least) return over >= -tolerance;
    return std::abs(over) <= tolerance;
  }
};

/// `expected` ± a share of it.
inline Row relative(std::string quantity, double value, double expected, double share) {
  return {std::move(quantity), value, expected, share * std::abs(expected)};
}
/// Somewhere in [lo, hi].
inline Row within(std::string quantity, double value, double lo, double hi) {
  return {std::move(quantity), value, (lo + hi) / 2, (hi - lo) / 2};
}
inline Row at_most(std::string quantity, double value, double bound) {
  return {std::move(quantity), value, bound, 0, Relation::at_most};
}
inline Row at_least(std::string quantity, double value, double bound) {
  return {std::move(quantity), value, bound, 0, Relation::at_least};
}
/// How often something that must not happen did.
inline Row never(std::string quantity, int times) {
  return {std::move(quantity), static_cast<double>(times), 0, 0};
}

struct Experiment {
  std::string_view name;  ///< as a command takes it
  std::string_view title;
  std::string_view source;  ///< where the expected numbers are from
  std::vector<Row> (*run)();
  bool slow = false;  ///< minutes: run where it is named, or all are asked for
};

/// All of them, in the order of the README.
[[nodiscard]] std::span<const Experiment> experiments();

// reproduce_fits.cpp
std::vector<Row> closed_forms();
std::vector<Row> published_critical_batches();
std::vector<Row> fit_recovery();
std::vector<Row> message_cost();
std::vector<Row> study_statistics();
// reproduce_noise.cpp
std::vector<Row> noisy_quadratic();
std::vector<Row> matrix_least_squares();
std::vector<Row> distributed_noise_scale();
std::vector<Row> dual_norm_noise();
// reproduce_spectra.cpp
std::vector<Row> random_features();
std::vector<Row> gated_features();
std::vector<Row> nuclear_rank_growth();
std::vector<Row> one_step();
std::vector<Row> matrix_sensing();
std::vector<Row> self_polar_flow();
std::vector<Row> imbalanced_mixture();
std::vector<Row> polar_noise();
std::vector<Row> stable_rank_constants();
std::vector<Row> metric_inequalities();
// reproduce_training.cpp
std::vector<Row> sparse_regression_small();
std::vector<Row> sparse_regression_full();
/// A step of one of their networks: its loss before it, and the stable ranks of the activations
/// that layers 2, 3 and 4 multiply.
struct SparseRegressionStep {
  double loss = 0;
  std::array<double, 3> stable_ranks{};
};
std::vector<SparseRegressionStep> sparse_regression_run(int inputs, int width, std::uint64_t seed,
                                                        bool spectral, int steps);

}  // namespace orthrus::studies
