#pragma once
/// @file
/// Trials of a study whose law is known: what the chain from trials to intervals is judged by.

#include <cmath>
#include <orthrus/studies/cells.hpp>
#include <span>
#include <string>
#include <vector>

#include "runtime/studies/random.hpp"

namespace orthrus::studies {

constexpr double least_steps = 100, critical = 64;

/// S(B, η) = 100(1 + 64/B)·exp(½(ln η/η*(B))²), η* = 0.01·√B, and log-normal noise.
inline double steps_at(double batch, double lr) {
  const double off = std::log(lr / (0.01 * std::sqrt(batch)));
  return least_steps * (1 + critical / batch) * std::exp(0.5 * off * off);
}

struct Protocol {
  double noise = 0;
  int tuning_seeds = 2, reporting_seeds = 3;
  bool fresh = true;        ///< false: one list of seeds, for both
  bool report_all = false;  ///< fresh seeds at every rate, and not at the chosen one alone
};

/// Trials of batches 4 … 1024 at five rates √2 apart around η*; with fresh seeds at the rate that
/// the others chose, as a study runs them.
inline std::vector<TrialOutcome> simulate(const Protocol& protocol, Random& random,
                                          const std::string& series = "sgd", double factor = 1) {
  std::vector<TrialOutcome> trials;
  for (double batch = 4; batch <= 1024; batch *= 2) {
    const auto add = [&](double lr, std::int64_t seed, SeedRole role) {
      const double value =
          factor * steps_at(batch, lr) * std::exp(protocol.noise * random.normal());
      trials.push_back({series, batch, lr, seed, role, value});
    };
    const auto rate = [&](int k) { return 0.01 * std::sqrt(batch) * std::pow(2.0, k / 2.0); };
    const std::size_t first = trials.size();
    for (int k = -2; k <= 2; ++k) {
      for (int seed = 0; seed < protocol.tuning_seeds; ++seed) {
        add(rate(k), seed, protocol.fresh ? SeedRole::tune : SeedRole::only);
      }
      for (int seed = 0; protocol.report_all && seed < protocol.reporting_seeds; ++seed) {
        add(rate(k), 10 + seed, SeedRole::report);
      }
    }
    if (!protocol.fresh || protocol.report_all) continue;
    const double chosen =
        cells_of(std::span(trials).subspan(first), RateMetric::steps_to_target)[0].choice.lr;
    for (int seed = 0; seed < protocol.reporting_seeds; ++seed) {
      add(chosen, 10 + seed, SeedRole::report);
    }
  }
  return trials;
}

}  // namespace orthrus::studies
