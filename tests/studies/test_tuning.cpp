// A learning rate is chosen by its mean over seeds, and the choice says how far it can be trusted.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/tuning.hpp>

namespace orthrus::studies {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Rates √2 apart, 2^(first/2) … 2^(last/2), whose loss is 2 + ½·(ln η − ln best)².
std::vector<RateOutcome> valley(int first, int last, double log_best) {
  std::vector<RateOutcome> outcomes;
  for (int k = first; k <= last; ++k) {
    const double x = 0.5 * k * std::log(2.0), d = x - log_best;
    outcomes.push_back({std::exp(x), {2 + 0.5 * d * d}});
  }
  return outcomes;
}

TEST(ChooseRate, FindsTheVertexOfAParabola) {
  constexpr double log_best = 0.1;
  const RateChoice choice = choose_rate(valley(-4, 4, log_best), RateMetric::loss);
  EXPECT_NEAR(choice.lr, 1, 1e-12);  // ln √2 = 0.35: the nearest of the grid
  EXPECT_NEAR(std::log(choice.fitted_lr), log_best, 1e-9);
  EXPECT_NEAR(choice.curvature, 1, 1e-9);
  EXPECT_EQ(choice.edge, GridEdge::none);
  EXPECT_FALSE(choice.censored);
  EXPECT_NEAR(choice.value, 2.005, 1e-12);
}

TEST(ChooseRate, FitsStepsByTheirLogarithms) {
  // ln S is the parabola 5 + d²: S within 10 % of its least where d² ≤ ln 1.1.
  std::vector<RateOutcome> outcomes;
  for (int k = -40; k <= 40; ++k) {
    const double d = 0.05 * k;
    outcomes.push_back({std::exp(d - 3), {std::exp(5 + d * d)}});
  }
  const RateChoice choice = choose_rate(outcomes, RateMetric::steps_to_target);
  EXPECT_NEAR(choice.lr, std::exp(-3), 1e-12);
  EXPECT_NEAR(choice.fitted_lr / std::exp(-3), 1, 1e-9);
  EXPECT_NEAR(choice.curvature, 2, 1e-9);
  // Between points 0.05 apart S is interpolated linearly: less than 0.01 octave off.
  EXPECT_NEAR(choice.plateau_octaves, 2 * std::sqrt(std::log(1.1)) / std::log(2.0), 0.01);
}

TEST(ChooseRate, TakesGeometricMeansOfStepsAndArithmeticOnesOfLosses) {
  // √(1·9) = 3 < 3.5 < (1 + 9)/2.
  const std::vector<RateOutcome> outcomes{{0.1, {1, 9}}, {0.2, {3.5, 3.5}}};
  EXPECT_EQ(choose_rate(outcomes, RateMetric::steps_to_target).lr, 0.1);
  EXPECT_NEAR(choose_rate(outcomes, RateMetric::steps_to_target).value, 3, 1e-12);
  EXPECT_EQ(choose_rate(outcomes, RateMetric::loss).lr, 0.2);
  EXPECT_EQ(choose_rate(outcomes, RateMetric::loss).value, 3.5);
}

TEST(ChooseRate, SaysOnWhichEndOfTheGridTheBestRateLies) {
  EXPECT_EQ(choose_rate(valley(-4, 4, -5), RateMetric::loss).edge, GridEdge::low);
  EXPECT_EQ(choose_rate(valley(-4, 4, +5), RateMetric::loss).edge, GridEdge::high);
  EXPECT_EQ(choose_rate(valley(0, 1, -5), RateMetric::loss).edge, GridEdge::low);
  const RateChoice single = choose_rate(valley(2, 2, -5), RateMetric::loss);
  EXPECT_EQ(single.edge, GridEdge::none);
  EXPECT_EQ(single.fitted_lr, single.lr);
}

TEST(ChooseRate, OrderOfTheOutcomesDoesNotMatter) {
  std::vector<RateOutcome> outcomes = valley(-4, 4, 0.1);
  const RateChoice expected = choose_rate(outcomes, RateMetric::loss);
  std::swap(outcomes[0], outcomes[5]);
  std::swap(outcomes[2], outcomes[8]);
  const RateChoice choice = choose_rate(outcomes, RateMetric::loss);
  EXPECT_EQ(choice.lr, expected.lr);
  EXPECT_EQ(choice.fitted_lr, expected.fitted_lr);
}

TEST(ChooseRate, ARateThatDivergedOnOneSeedIsNotChosen) {
  std::vector<RateOutcome> outcomes = valley(-4, 4, 0.1);
  outcomes[4].values.push_back(infinity);  // the best
  RateChoice choice = choose_rate(outcomes, RateMetric::loss);
  EXPECT_NEAR(choice.lr, std::sqrt(2.0), 1e-12);
  EXPECT_EQ(choice.fitted_lr, choice.lr);  // no parabola through a neighbour at infinity
  // Rates that diverge above the best one are inside the grid: it needs no extension there.
  outcomes = valley(-4, 4, 5);
  outcomes.back().values = {infinity};
  EXPECT_EQ(choose_rate(outcomes, RateMetric::loss).edge, GridEdge::none);
  for (RateOutcome& outcome : outcomes) outcome.values = {std::nan("")};
  choice = choose_rate(outcomes, RateMetric::loss);
  EXPECT_TRUE(choice.censored);
  EXPECT_EQ(choice.lr, 0);
  EXPECT_EQ(choice.edge, GridEdge::none);
}

TEST(ChooseRate, OfEqualMeansTheSmallerRateIsTaken) {
  EXPECT_EQ(
      choose_rate(std::vector<RateOutcome>{{0.4, {7}}, {0.1, {9}}, {0.2, {7}}}, RateMetric::loss)
          .lr,
      0.2);
}

TEST(ChooseRate, RefusesWhatIsNoTuningCurve) {
  const auto choose = [](const std::vector<RateOutcome>& outcomes) {
    return choose_rate(outcomes, RateMetric::steps_to_target);
  };
  EXPECT_THROW((void)choose({}), ShapeError);
  EXPECT_THROW((void)choose({{0.1, {}}}), ShapeError);
  EXPECT_THROW((void)choose({{0.1, {3}}, {0.1, {4}}}), ShapeError);
  EXPECT_THROW((void)choose({{0, {3}}}), NumericError);
  EXPECT_THROW((void)choose({{0.1, {0}}}), NumericError);
}

}  // namespace
}  // namespace orthrus::studies
