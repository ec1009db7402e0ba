// What trials say of their times.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "runtime/cli/start_window.hpp"
#include "runtime/cli/trial_timing.hpp"

namespace orthrus::cli {
namespace {

// Clocks that are seconds apart, of ranks that come milliseconds apart: they begin together by the
// clock that they share, which they do not know of.
TEST(StartWindow, LetsRanksBeginTogetherWhateverTheirClocksSay) {
  constexpr int ranks = 4, steps = 12;
  std::vector<std::vector<double>> began(steps, std::vector<double>(ranks));
  std::vector<double> offsets(ranks), round_trips(ranks), late(ranks);
  run_thread_ranks(ranks, [&](Communicator& comm) {
    const auto me = static_cast<std::size_t>(comm.rank());
    const double wrong = 17.5 * comm.rank();
    StartWindow window(comm, [wrong] { return StartWindow::steady() + wrong; });
    for (int step = 0; step < steps; ++step) {
      std::this_thread::sleep_for(std::chrono::milliseconds(comm.rank()));
      late[me] = std::max(late[me], window.wait());
      began[static_cast<std::size_t>(step)][me] = StartWindow::steady();
    }
    offsets[me] = window.offset();
    round_trips[me] = window.round_trip();
  });
  double most_late = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    EXPECT_NEAR(offsets[r], -17.5 * static_cast<double>(r), round_trips[r] / 2 + 1e-9);
    EXPECT_GE(late[r], 0);
    most_late = std::max(most_late, late[r] + round_trips[r]);
  }
  // Not later than they say, but for the time until a thread that shares a processor runs again:
  // half of the steps have none of it.
  std::vector<double> spreads;
  for (const std::vector<double>& step : began)
    spreads.push_back(*std::max_element(step.begin(), step.end()) -
                      *std::min_element(step.begin(), step.end()));
  EXPECT_LE(quantile(spreads, 0), most_late + 1e-4);
}

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
