#include "runtime/cli/study_loss_law.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

namespace orthrus::cli {
namespace {

using studies::LossCell;
using studies::LossLaw;

LossLaw fit(const std::vector<const LawRun*>& runs) {
  std::vector<LossCell> cells;
  for (const LawRun* run : runs) cells.insert(cells.end(), run->cells.begin(), run->cells.end());
  return studies::fit_loss(cells);
}

studies::Interval percentiles(std::vector<double> values, double level) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(values.size() - 1);
    const auto low = static_cast<std::size_t>(place);
    const std::size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (place - std::floor(place)) * (values[high] - values[low]);
  };
  return {at((1 - level) / 2), at((1 + level) / 2)};
}

}  // namespace

LawRun law_run(const StudyResults& study, const StudyTrial& trial, const std::string& metric) {
  LawRun run;
  run.batch = trial.param("batch_size");
  std::vector<std::pair<double, double>> seen;  // steps, loss
  for (const nlohmann::ordered_json& line : study.metrics(trial, "eval")) {
    const auto step = line.find("step"), loss = line.find(metric);
    if (step == line.end() || loss == line.end() || !loss->is_number()) continue;
    if (step->get<double>() > 0 && loss->get<double>() > 0) {
      seen.emplace_back(step->get<double>(), loss->get<double>());
    }
  }
  if (seen.empty()) return run;
  double last = INFINITY;
  for (int k = 0; k < 8; ++k) {
    const double wanted = seen.back().first / std::pow(1.5, k);
    const auto nearest =
        std::min_element(seen.begin(), seen.end(), [&](const auto& a, const auto& b) {
          return std::abs(a.first - wanted) < std::abs(b.first - wanted);
        });
    if (nearest->first >= last) continue;  // evaluations are rarer
    last = nearest->first;
    run.cells.push_back({0, nearest->first, run.batch, nearest->second});
  }
  return run;
}

std::optional<SeriesLaw> fit_law(const std::string& series, const std::vector<LawRun>& runs,
                                 int resamples, double level) {
  std::map<double, std::vector<const LawRun*>> by_batch;
  SeriesLaw out;
  out.series = series;
  std::vector<const LawRun*> all;
  for (const LawRun& run : runs) {
    if (run.cells.empty()) continue;
    by_batch[run.batch].push_back(&run);
    all.push_back(&run);
    out.cells.insert(out.cells.end(), run.cells.begin(), run.cells.end());
    out.examples = std::max(out.examples, run.batch * run.cells.front().steps);
  }
  constexpr std::size_t parameters = 5;
  if (by_batch.size() < 3 || out.cells.size() < 2 * parameters) return {};
  out.runs = all.size();
  out.least_batch = by_batch.begin()->first;
  out.largest_batch = by_batch.rbegin()->first;
  out.law = fit(all);
  out.best_batch = out.law.best_batch(out.examples);
  const bool has_seeds = std::all_of(by_batch.begin(), by_batch.end(),
                                     [](const auto& of) { return of.second.size() > 1; });
  if (!has_seeds || resamples < 2) return out;
  std::mt19937_64 random(0);
  std::vector<double> beta, gamma, exponent, best;
  for (int r = 0; r < resamples; ++r) {
    std::vector<const LawRun*> drawn;
    for (const auto& [batch, of] : by_batch) {
      for (std::size_t k = 0; k < of.size(); ++k) drawn.push_back(of[random() % of.size()]);
    }
    const LossLaw law = fit(drawn);
    beta.push_back(law.batch_exponent);
    gamma.push_back(law.steps_exponent);
    exponent.push_back(law.best_batch_exponent());
    best.push_back(law.best_batch(out.examples));
  }
  out.batch_exponent = percentiles(beta, level);
  out.steps_exponent = percentiles(gamma, level);
  out.best_exponent = percentiles(exponent, level);
  out.best = percentiles(best, level);
  return out;
}

}  // namespace orthrus::cli
