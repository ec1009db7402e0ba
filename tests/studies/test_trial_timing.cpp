// What trials say of their times.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "runtime/cli/trial_timing.hpp"

namespace orthrus::cli {
namespace {

TEST(MedianInterval, HoldsTheMedianAsOftenAsItSays) {
  // Of a skewed law, whose median is ln 2.
  std::mt19937_64 random(1);
  std::exponential_distribution<double> law;
  for (const std::size_t n : {30U, 101U}) {
    int inside = 0;
    constexpr int trials = 4000;
    for (int k = 0; k < trials; ++k) {
      std::vector<double> times(n);
      for (double& x : times) x = law(random);
      const MedianInterval found = median_interval(times);
      inside += found.lo <= std::log(2) && std::log(2) <= found.hi ? 1 : 0;
      EXPECT_LE(found.lo, quantile(times, 0.5));
      EXPECT_GE(found.hi, quantile(times, 0.5));
    }
    // 95 % and what whole ranks add to it; a deviation is .35 %.
    EXPECT_GE(inside, trials * 94 / 100) << n;
    EXPECT_LE(inside, trials * 985 / 1000) << n;
  }
}

TEST(MedianInterval, OfFewOrNoneIsWhatThereIs) {
  EXPECT_EQ(median_interval({3}).lo, 3);
  EXPECT_EQ(median_interval({3}).hi, 3);
  EXPECT_EQ(median_interval({2, 1}).lo, 1);
  EXPECT_EQ(median_interval({2, 1}).hi, 2);
  EXPECT_TRUE(std::isnan(median_interval({}).lo));
  EXPECT_TRUE(std::isnan(quantile({}, 0.5)));
  EXPECT_EQ(quantile({5, 1, 3}, 0.5), 3);
}

}  // namespace
}  // namespace orthrus::cli
