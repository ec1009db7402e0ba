#include "runtime/cli/study_horizon.hpp"

#include <algorithm>
#include <orthrus/studies/fit.hpp>
#include <random>

namespace orthrus::cli {
namespace {

using studies::Cell;
using studies::ConvergencePoint;
using Runs = std::vector<const LawRun*>;

studies::LossCurve curve_of(const Runs& runs) {
  studies::LossCurve curve;
  for (const LawRun* const run : runs) {
    curve.batch = run->batch;
    for (const studies::LossCell& cell : run->cells) {
      curve.examples.push_back(cell.batch * cell.steps);
      curve.losses.push_back(cell.loss);
    }
  }
  return curve;
}

Runs not_empty(std::span<const LawRun> runs) {
  Runs out;
  for (const LawRun& run : runs) {
    if (!run.cells.empty()) out.push_back(&run);
  }
  return out;
}

/// Examples that each run of a cell took.
std::vector<double> examples_of(const Cell& cell) {
  std::vector<double> out;
  for (const studies::SeedValue& seed : cell.record) out.push_back(cell.batch * seed.value);
  return out;
}

std::vector<ConvergencePoint> points_of(std::span<const Cell> cells) {
  std::vector<ConvergencePoint> out;
  for (const Cell& cell : cells) {
    if (!cell.censored()) out.push_back({cell.batch, studies::olympic_mean(examples_of(cell))});
  }
  return out;
}

}  // namespace

std::optional<SeriesEfficiency> fit_efficiency(std::span<const LawRun> numerator,
                                               std::span<const LawRun> denominator, int resamples,
                                               double level) {
  const Runs above = not_empty(numerator), under = not_empty(denominator);
  const auto fit = [](const Runs& a, const Runs& b) {
    const std::vector<studies::LossCurve> curves{curve_of(a), curve_of(b)};
    return studies::fit_data_efficiency(curves);
  };
  constexpr std::size_t least = 5;
  if (curve_of(above).losses.size() < least || curve_of(under).losses.size() < least) return {};
  SeriesEfficiency out;
  out.batch = above.front()->batch;
  out.runs = above.size() + under.size();
  out.law = fit(above, under);
  out.ratio = out.law.ratio(0, 1);
  if (above.size() < 2 || under.size() < 2 || resamples < 2) return out;
  std::mt19937_64 random(0);
  const auto drawn = [&](const Runs& runs) {
    Runs again;
    for (std::size_t k = 0; k < runs.size(); ++k) again.push_back(runs[random() % runs.size()]);
    return again;
  };
  std::vector<double> ratios;
  for (int r = 0; r < resamples; ++r) {
    const Runs a = drawn(above), b = drawn(under);
    ratios.push_back(fit(a, b).ratio(0, 1));
  }
  out.interval = studies::percentile_interval(std::move(ratios), level);
  return out;
}

SeriesConvergence convergence_of(const std::string& series, std::span<const Cell> cells,
                                 std::span<const Cell> reference) {
  const std::vector<ConvergencePoint> all = points_of(cells);
  const std::vector<ConvergencePoint> kept = studies::convergence_points(all);
  const std::vector<ConvergencePoint> line = studies::convergence_points(points_of(reference));
  SeriesConvergence out;
  out.series = series;
  for (const Cell& cell : cells) {
    const auto at = std::find_if(all.begin(), all.end(), [&](const ConvergencePoint& point) {
      return point.batch == cell.batch;
    });
    if (at == all.end()) continue;
    SeriesConvergence::Point& point = out.points.emplace_back();
    point.at = *at;
    point.runs = cell.record.size();
    point.kept = std::any_of(kept.begin(), kept.end(), [&](const ConvergencePoint& other) {
      return other.batch == cell.batch;
    });
    const bool inside = !line.empty() && line.front().batch <= cell.batch &&
                        cell.batch <= line.back().batch && line.size() > 1;
    if (inside && cell.record.size() > 1)
      point.slower =
          studies::slower_than(examples_of(cell), studies::examples_at(line, cell.batch));
  }
  return out;
}

}  // namespace orthrus::cli
