// Laws along the data: of losses that are made of one, it is found.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/studies/horizon.hpp>

#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

using testing::ElementsAre;
using testing::Field;

/// D(L, B) = D_1·L^(−1/p)·(1 + B/(c·D_min^k)): its curves are power laws of exponent p only where
/// B_crit does not depend on L (k = 0).
constexpr double kExponent = 0.25, kData = 1e4;

std::vector<LossCurve> curves(double critical) {
  std::vector<LossCurve> out;
  for (const double batch : {8.0, 32.0, 128.0, 512.0}) {
    LossCurve curve{batch, {}, {}};
    for (double loss = 4; loss > 1.2; loss *= 0.9) {
      curve.losses.push_back(loss);
      curve.examples.push_back(kData * std::pow(loss, -1 / kExponent) * (1 + batch / critical));
    }
    out.push_back(curve);
  }
  return out;
}

TEST(PowerLines, FindCriticalBatchesPerTarget) {
  const auto of = curves(100);
  const std::vector<double> targets{3, 2, 1.5};
  const PowerLines found = fit_power_lines(of, targets);
  ASSERT_EQ(found.targets.size(), 3U);
  for (std::size_t i = 0; i < targets.size(); ++i) {
    // Levenberg-Marquardt ends where a step changes less than 1e-8 or so.
    EXPECT_NEAR(found.targets[i].critical_batch, 100, 1e-3);
    const double least = kData * std::pow(targets[i], -1 / kExponent);
    EXPECT_NEAR(found.targets[i].least_examples, least, 1e-5 * least);
    EXPECT_NEAR(found.curves[i].exponent, -kExponent, 1e-9);
  }
  EXPECT_NEAR(found.growth.exponent, 0, 1e-4) << "the critical batch does not grow here";
}

TEST(PowerLines, LeaveOutWhatWasNotReached) {
  auto of = curves(100);
  for (auto* list : {&of[3].losses, &of[3].examples}) list->resize(3);  // down to 3.24
  const std::vector<double> targets{3.5, 2, 0.5};
  const PowerLines found = fit_power_lines(of, targets);
  ASSERT_EQ(found.targets.size(), 2U) << "0.5 nobody reaches; 2 three batches do";
  EXPECT_NEAR(found.targets[1].critical_batch, 100, 1e-3);
  of.resize(2);
  EXPECT_TRUE(fit_power_lines(of, targets).targets.empty());
  const std::vector<LossCurve> short_one{{8, {1}, {1}}};
  EXPECT_THROW(static_cast<void>(fit_power_lines(short_one, targets)), ShapeError);
  const std::vector<LossCurve> negative{{8, {1, 2}, {1, -1}}};
  EXPECT_THROW(static_cast<void>(fit_power_lines(negative, targets)), NumericError);
}

TEST(DataEfficiency, IsTheShiftBetweenCurvesOfOneFloor) {
  Random random(3);
  for (const double noise : {0.0, 0.003}) {
    std::vector<LossCurve> series(2);
    for (double d = 1e3; d < 1e7; d *= 2) {
      for (std::size_t s = 0; s < 2; ++s) {
        // The second needs .7 of the examples.
        const double examples = s == 0 ? d : d / 0.7;
        series[s].examples.push_back(d);
        series[s].losses.push_back((1.7 + 30 * std::pow(examples, -0.4)) *
                                   std::exp(noise * random.normal()));
      }
    }
    const DataEfficiency found = fit_data_efficiency(series);
    // 14 points a curve: the shift's error is about noise/(β·share of the loss that falls)/√14.
    EXPECT_NEAR(found.ratio(1, 0), 0.7, noise == 0 ? 1e-5 : 0.05);
    EXPECT_NEAR(found.ratio(0, 1) * found.ratio(1, 0), 1, 1e-12);
    EXPECT_NEAR(found.irreducible, 1.7, noise == 0 ? 1e-5 : 0.05);
    EXPECT_NEAR(found.exponent, 0.4, noise == 0 ? 1e-5 : 0.05);
    EXPECT_LE(found.rms_log, 1.3 * noise + 1e-8);
  }
  const std::vector<LossCurve> few{{0, {1, 2}, {3, 2}}};
  EXPECT_THROW(static_cast<void>(fit_data_efficiency(few)), ShapeError);
}

TEST(OlympicMean, LeavesOutTheBestAndTheWorst) {
  EXPECT_EQ(olympic_mean(std::vector<double>{9, 1, 2, 3, 100}), (2.0 + 3 + 9) / 3);
  EXPECT_EQ(olympic_mean(std::vector<double>{4, 1, 7}), 4);
  EXPECT_EQ(olympic_mean(std::vector<double>{1, 3}), 2);
  EXPECT_THROW(static_cast<void>(olympic_mean({})), ShapeError);
}

TEST(ConvergencePoints, AreConvexAndInterpolate) {
  // 300 at 2 lies above the line from 100 at 1 to 200 at 3; without it 200 lies above that to 210
  // at 9.
  const auto left = convergence_points({{1, 100}, {2, 300}, {3, 200}, {9, 210}});
  const auto point = [](double b, double e) {
    return testing::AllOf(Field(&ConvergencePoint::batch, b),
                          Field(&ConvergencePoint::examples, e));
  };
  EXPECT_THAT(left, ElementsAre(point(1, 100), point(9, 210)));
  EXPECT_EQ(examples_at(left, 5), 155);
  EXPECT_THROW(static_cast<void>(examples_at(left, 10)), ConfigError);
  EXPECT_THAT(convergence_points({{1, 100}, {2, 120}, {4, 200}}),
              ElementsAre(point(1, 100), point(2, 120), point(4, 200)));
  EXPECT_THROW(static_cast<void>(convergence_points({{2, 1}, {1, 1}})), ShapeError);
}

TEST(SlowerThan, IsRightAsOftenAsItSays) {
  Random random(5);
  int wrong = 0, found = 0;
  constexpr int trials = 4000;
  for (int k = 0; k < trials; ++k) {
    std::vector<double> same, slower;
    for (int i = 0; i < 5; ++i) {
      same.push_back(100 + 3 * random.normal());
      slower.push_back(110 + 3 * random.normal());
    }
    wrong += slower_than(same, 100) ? 1 : 0;
    found += slower_than(slower, 100) ? 1 : 0;
  }
  // 5 %, of 4000: 200 with a deviation of 14.
  EXPECT_NEAR(wrong, 200, 56);
  EXPECT_GT(found, trials * 95 / 100);
}

}  // namespace
}  // namespace orthrus::studies
