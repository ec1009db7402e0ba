// The chain of a study, from trials to intervals, on outcomes whose law is known.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <orthrus/error.hpp>
#include <orthrus/studies/cells.hpp>
#include <string>

#include "runtime/studies/random.hpp"
#include "runtime/studies/simulated_study.hpp"

namespace orthrus::studies {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
std::vector<Cell> exact_cells() {
  Random random(1);
  return cells_of(simulate({}, random), RateMetric::steps_to_target);
}

TEST(Cells, TakeTheRateOfTheTuningSeedsAndTheValueOfTheOthers) {
  const std::vector<TrialOutcome> trials{
      {"muon", 8, 0.1, 0, SeedRole::tune, 50},    {"muon", 8, 0.2, 0, SeedRole::tune, 40},
      {"muon", 8, 0.4, 0, SeedRole::tune, 60},    {"muon", 8, 0.2, 10, SeedRole::report, 42},
      {"muon", 8, 0.2, 11, SeedRole::report, 46}, {"muon", 4, 0.1, 0, SeedRole::tune, 90},
      {"adamw", 8, 0.1, 0, SeedRole::only, 70},   {"adamw", 8, 0.1, 1, SeedRole::only, 90}};
  const std::vector<Cell> cells = cells_of(trials, RateMetric::steps_to_target);
  ASSERT_EQ(cells.size(), 3U);
  EXPECT_EQ(cells[0].series, "muon");
  EXPECT_EQ(cells[0].batch, 4);  // half finished: its tuning seed is all there is
  EXPECT_EQ(cells[0].value, 90);
  EXPECT_FALSE(cells[0].fresh);
  EXPECT_EQ(cells[1].choice.lr, 0.2);
  EXPECT_NEAR(cells[1].value, std::sqrt(42.0 * 46), 1e-12);
  EXPECT_TRUE(cells[1].fresh);
  EXPECT_EQ(cells[2].series, "adamw");
  EXPECT_EQ(cells[2].record.size(), 2U);
  EXPECT_FALSE(cells[2].fresh);
  EXPECT_TRUE(cells_of({}, RateMetric::loss).empty());
  EXPECT_THROW((void)cells_of(std::vector<TrialOutcome>{{"a", 0, 1}}, RateMetric::loss),
               NumericError);
}

TEST(Cells, ACellOfWhichNothingIsKnownIsCensoredAndNotPartOfTheFit) {
  Random random(1);
  std::vector<TrialOutcome> trials = simulate({}, random);
  for (TrialOutcome& trial : trials) {
    if (trial.batch == 4) trial.value = infinity;
  }
  // A report alone that did not reach the target says as much.
  for (TrialOutcome& trial : trials) {
    if (trial.batch == 1024 && trial.role == SeedRole::report && trial.seed == 11) {
      trial.value = infinity;
    }
  }
  const std::vector<Cell> cells = cells_of(trials, RateMetric::steps_to_target);
  EXPECT_TRUE(cells.front().choice.censored);
  EXPECT_FALSE(cells.back().choice.censored);
  const StepsStudy study = study_steps(cells, {});
  EXPECT_EQ(study.censored, (std::vector<double>{4, 1024}));
  EXPECT_EQ(study.batches, (std::vector<double>{8, 16, 32, 64, 128, 256, 512}));
  EXPECT_NEAR(study.critical[0].value, critical, 1e-6);
}

// Of its rates the least counts, of seeds the mean; one that diverged is not the best.
TEST(Cells, ACensoredCellSaysWhatItsStepsAreMoreThan) {
  const auto cell = [](std::vector<TrialOutcome> trials) {
    return cells_of(trials, RateMetric::steps_to_target)[0];
  };
  const Cell all = cell({{"sgd", 8, 0.1, 0, SeedRole::only, infinity, 400},
                         {"sgd", 8, 0.1, 1, SeedRole::only, 100, 0},
                         {"sgd", 8, 0.2, 0, SeedRole::only, infinity, 900},
                         {"sgd", 8, 0.4, 0, SeedRole::only, infinity, 0}});
  EXPECT_TRUE(all.censored());
  EXPECT_NEAR(all.above, 200, 1e-9);  // √(400·100)
  // Chosen by one seed, not reached by another.
  const Cell one = cell({{"sgd", 8, 0.1, 0, SeedRole::tune, 100, 0},
                         {"sgd", 8, 0.1, 1, SeedRole::report, infinity, 400}});
  EXPECT_NEAR(one.above, 400, 1e-9);
  EXPECT_EQ(cell({{"sgd", 8, 0.4, 0, SeedRole::only, infinity, 0}}).above, 0);
}

TEST(Cells, WithoutNoiseTheLawsComeOutAsTheyAre) {
  const std::vector<Cell> cells = exact_cells();
  const StepsStudy study = study_steps(cells, {});
  EXPECT_EQ(study.kind, IntervalKind::stratified);
  EXPECT_NEAR(study.fit.parameters[0], least_steps, 1e-5);
  EXPECT_NEAR(study.fit.parameters[1], least_steps * critical, 1e-4);
  ASSERT_EQ(study.critical.size(), 2U);
  EXPECT_NEAR(study.critical[0].value, critical, 1e-6);
  EXPECT_NEAR(study.critical[1].value, 1.2 * 256 + 0.2 * critical, 1e-6);
  EXPECT_NEAR(study.critical[0].interval.lo, critical, 1e-5);
  EXPECT_NEAR(study.critical[0].interval.hi, critical, 1e-5);
  const RateStudy rates = study_rates(cells);
  EXPECT_NEAR(rates.law.exponent, 0.5, 1e-9);
  EXPECT_NEAR(rates.law.factor, 0.01, 1e-9);
  EXPECT_EQ(rates.kind, IntervalKind::stratified);
}

TEST(Cells, OneReportingSeedLeavesResidualsToResample) {
  Random random(2);
  Protocol protocol;
  protocol.noise = 0.02;
  protocol.tuning_seeds = protocol.reporting_seeds = 1;
  const std::vector<Cell> cells = cells_of(simulate(protocol, random), RateMetric::steps_to_target);
  StepsQuestion question;
  question.bootstrap.resamples = 200;
  const StepsStudy study = study_steps(cells, question);
  EXPECT_EQ(study.kind, IntervalKind::residual);
  EXPECT_LT(study.critical[0].interval.lo, study.critical[0].value);
  EXPECT_GT(study.critical[0].interval.hi, study.critical[0].value);
  EXPECT_EQ(study_rates(cells).kind, IntervalKind::student_t);
  question.bootstrap.resamples = 0;
  EXPECT_EQ(study_steps(cells, question).kind, IntervalKind::none);
}

TEST(Cells, RatesThatStopGrowingAreTakenBelowTheirKnee) {
  std::vector<TrialOutcome> trials;
  for (double batch = 1; batch <= 4096; batch *= 2) {
    const double best = 0.01 * std::min(batch, 64.0);
    for (int k = -3; k <= 3; ++k) {
      const double d = 0.5 * k * std::log(2.0);
      trials.push_back({"sgd", batch, best * std::exp(d), 0, SeedRole::only, 1 + d * d});
    }
  }
  const RateStudy rates = study_rates(cells_of(trials, RateMetric::loss));
  ASSERT_TRUE(rates.bent.has_value());
  EXPECT_TRUE(rates.bent->preferred);
  EXPECT_NEAR(rates.bent->knee, 64, 1e-3);
  EXPECT_NEAR(rates.law.exponent, 1, 1e-6);
}

/// Losses 1 + c·(log₂ η − best)² at rates half an octave apart, of a model of two, four times the
/// size: the best rate of the last is `moved` octaves from that of the first.
std::vector<Cell> grown(double moved, double noise, std::uint64_t seed) {
  Random random(seed, 1);
  std::vector<TrialOutcome> trials;
  for (int size = 0; size < 3; ++size) {
    const double best = -5 + moved * size / 2;
    for (int k = -5; k <= 5; ++k) {
      for (std::int64_t s = 0; s < 3; ++s) {
        const double octaves = -5 + 0.5 * k;
        trials.push_back(
            {"width " + std::to_string(size), 8, std::exp2(octaves), s, SeedRole::only,
             1 + 0.05 * (octaves - best) * (octaves - best) + noise * random.normal()});
      }
    }
  }
  return cells_of(trials, RateMetric::loss);
}

TEST(RateShifts, AreTheOctavesThatTheBestRateMoves) {
  const std::vector<double> sizes{32, 64, 128};
  for (const double moved : {0.0, -0.25, -1.5}) {
    const std::vector<RateShift> shifts = rate_shifts(grown(moved, 0, 1), sizes, {0});
    ASSERT_EQ(shifts.size(), 3U);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(shifts[i].size, sizes[i]);
      EXPECT_NEAR(shifts[i].shift, moved * static_cast<double>(i) / 2, 1e-9);
      EXPECT_EQ(shifts[i].kind, IntervalKind::none);
    }
    EXPECT_EQ(shifts[2].stays(), std::abs(moved) < 0.5);
    // At the grid's points: what the first model's rate costs over the nearest to the own best.
    const double nearest = std::round(2 * moved) / 2;
    EXPECT_NEAR(shifts[2].penalty, 0.05 * (moved * moved - (moved - nearest) * (moved - nearest)),
                1e-12);
    EXPECT_EQ(shifts[2].costs_nothing(), std::abs(moved) < 0.5);
    EXPECT_EQ(shifts[0].penalty, 0);
  }
}

TEST(RateShifts, HaveIntervalsThatHoldTheTruth) {
  const std::vector<double> sizes{32, 64, 128};
  int held = 0;
  constexpr int studies = 100;
  for (int k = 0; k < studies; ++k) {
    const auto shifts =
        rate_shifts(grown(-0.25, 0.002, 10 + static_cast<std::uint64_t>(k)), sizes, {200, 1, 0.95});
    ASSERT_EQ(shifts[2].kind, IntervalKind::stratified);
    held += shifts[2].interval.lo <= -0.25 && -0.25 <= shifts[2].interval.hi ? 1 : 0;
    EXPECT_EQ(shifts[0].interval.lo, 0);
    EXPECT_EQ(shifts[0].interval.hi, 0);
  }
  // 95 of a hundred, less four deviations of 2.2, and what three seeds know of a spread.
  EXPECT_GE(held, 84);
  // Where the interval holds half an octave nothing is decided.
  const auto open = rate_shifts(grown(-0.5, 0.01, 3), sizes, {200, 1, 0.95});
  EXPECT_FALSE(open[2].stays().has_value());
}

TEST(TokenRatios, PairSeedsAndSayWhatTheyCanClaim) {
  // Seeds move both alike: 20 % from seed to seed, the ratio 1.25 by pairs to ±1 %.
  std::vector<TrialOutcome> trials;
  for (int seed = 0; seed < 3; ++seed) {
    const double weather = std::exp(0.2 * (seed - 1)), own = std::exp(0.01 * (seed - 1));
    trials.push_back({"adamw", 64, 0.1, seed, SeedRole::only, 1000 * weather * 1.25 * own});
    trials.push_back({"muon", 64, 0.1, seed, SeedRole::only, 1000 * weather});
  }
  const std::vector<Cell> cells = cells_of(trials, RateMetric::steps_to_target);
  const std::vector<TokenRatio> ratios =
      token_ratios(std::span(cells).first(1), std::span(cells).last(1));
  ASSERT_EQ(ratios.size(), 1U);
  EXPECT_NEAR(ratios[0].ratio, 1.25, 1e-12);
  EXPECT_EQ(ratios[0].pairs, 3);
  // t of 0.975 with two degrees of freedom: 4.3027; the standard error 0.01/√3.
  EXPECT_NEAR(std::log(ratios[0].interval.hi / 1.25), 4.3027 * 0.01 / std::sqrt(3.0), 1e-5);
  EXPECT_TRUE(ratios[0].conclusive());
  // Unpaired, ln 1.25 is about one standard error of σ = √(½(0.21² + 0.2²)): no claim.
  const double sigma = std::sqrt(0.5 * (0.21 * 0.21 + 0.04));
  EXPECT_NEAR(seed_spread(cells).sigma, sigma, 1e-12);
  EXPECT_EQ(seed_spread(cells).freedom, 4);
  EXPECT_NEAR(ratios[0].sigmas, std::log(1.25) / (sigma * std::sqrt(2.0 / 3)), 1e-9);
  EXPECT_FALSE(ratios[0].claimed());
  // One pair has no interval, and concludes nothing.
  const std::vector<Cell> single =
      cells_of(std::span(trials).first(2), RateMetric::steps_to_target);
  const TokenRatio one = token_ratios(std::span(single).first(1), std::span(single).last(1))[0];
  EXPECT_EQ(one.interval.lo, 0);
  EXPECT_FALSE(one.conclusive());
}

TEST(ALocalCriticalBatch, IsTheLargestThatLosesNothing) {
  const auto of = [](std::vector<double> losses) {
    std::vector<Branch> branches;
    for (std::size_t k = 0; k < losses.size(); ++k) {
      branches.push_back({8.0 * static_cast<double>(k + 1), {{0, losses[k]}}});
    }
    return local_cbs(branches, 0.01);
  };
  const LocalCbs cbs = of({1.0, 1.005, 1.009, 1.02, 1.3});
  EXPECT_EQ(cbs.batch, 24);
  EXPECT_EQ(cbs.next, 32);
  EXPECT_EQ(cbs.epsilon, 0.01);
  // Each is compared with all smaller ones, not with its neighbour.
  EXPECT_EQ(of({1.0, 1.009, 1.018}).batch, 16);
  // A branch that lost does not keep a larger one from recovering.
  EXPECT_EQ(of({1.0, 1.1, 0.9}).batch, 24);
  EXPECT_EQ(of({1.0, 0.9, 0.8}).next, infinity);
  EXPECT_EQ(of({1.0, infinity}).batch, 8);
  EXPECT_EQ(of({infinity, infinity}).batch, 16);  // nobody is worse than anybody
  EXPECT_THROW(of({}), ShapeError);
}

TEST(ALocalCriticalBatch, KnowsTheNoiseBetweenBranchesOfASeed) {
  // Seeds lie far apart, which is no noise of differences; what is left is ±0.02.
  const std::vector<Branch> branches{{8, {{0, 1.02}, {1, 2.98}}}, {16, {{0, 1.0}, {1, 3.04}}}};
  const LocalCbs cbs = local_cbs(branches, 0.01);
  // Differences between the branches: −0.02 and 0.06; their mean has the error 0.04.
  EXPECT_NEAR(cbs.epsilon, 0.08, 1e-12);
  EXPECT_EQ(cbs.batch, 16);
  // A larger one that is noisy lends its noise to none but itself.
  std::vector<Branch> more = branches;
  more.push_back({32, {{0, 2.0}, {1, 7.0}}});
  const LocalCbs same = local_cbs(more, 0.01);
  EXPECT_EQ(same.epsilons[1], cbs.epsilon);
  EXPECT_GT(same.epsilons[2], 1);
}

}  // namespace
}  // namespace orthrus::studies
