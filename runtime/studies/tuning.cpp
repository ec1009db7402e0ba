#include <algorithm>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/fit.hpp>
#include <orthrus/studies/tuning.hpp>

namespace orthrus::studies {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Mean of the losses, or of the logarithms of the steps.
double mean_of(const RateOutcome& outcome, RateMetric metric) {
  double sum = 0;
  for (const double value : outcome.values) {
    if (!std::isfinite(value)) return infinity;
    expects<NumericError>(metric == RateMetric::loss || value > 0, "steps are above zero");
    sum += metric == RateMetric::loss ? value : std::log(value);
  }
  return sum / static_cast<double>(outcome.values.size());
}

}  // namespace

RateChoice choose_rate(std::span<const RateOutcome> outcomes, RateMetric metric) {
  expects(!outcomes.empty(), "a learning rate is chosen among at least one");
  std::vector<const RateOutcome*> sorted;
  for (const RateOutcome& outcome : outcomes) {
    expects(!outcome.values.empty(), "every learning rate has a seed");
    expects<NumericError>(std::isfinite(outcome.lr) && outcome.lr > 0,
                          "learning rates are finite and positive");
    sorted.push_back(&outcome);
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const RateOutcome* a, const RateOutcome* b) { return a->lr < b->lr; });
  std::vector<double> lrs, means;
  for (const RateOutcome* outcome : sorted) {
    expects(lrs.empty() || outcome->lr > lrs.back(), "learning rates are distinct");
    lrs.push_back(outcome->lr);
    means.push_back(mean_of(*outcome, metric));
  }
  const auto least = std::min_element(means.begin(), means.end());
  RateChoice choice;
  choice.censored = !std::isfinite(*least);
  choice.value = infinity;
  if (choice.censored) return choice;

  const bool loss = metric == RateMetric::loss;
  const auto best = static_cast<std::size_t>(least - means.begin());
  choice.lr = choice.fitted_lr = lrs[best];
  choice.value = loss ? *least : std::exp(*least);
  if (lrs.size() > 1) {
    if (best == 0) choice.edge = GridEdge::low;
    if (best + 1 == lrs.size()) choice.edge = GridEdge::high;
  }
  if (lrs.size() < 3) return choice;
  const Tuned tuned = tuned_lr(lrs, means);
  choice.fitted_lr = tuned.lr;
  choice.curvature = tuned.curvature;
  choice.plateau_octaves = tuned.plateau_octaves;
  if (!loss) {
    // +10 % is a share of the steps, not of their logarithm.
    std::vector<double> steps;
    for (const double mean : means) steps.push_back(std::exp(mean));
    choice.plateau_octaves = tuned_lr(lrs, steps, 0.10).plateau_octaves;
  }
  return choice;
}

}  // namespace orthrus::studies
