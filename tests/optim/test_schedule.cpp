// Schedules against their closed forms.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "optim/schedule.hpp"

namespace orthrus::optim {
namespace {

ScheduleConfig schedule(std::string kind, std::int64_t warmup, std::int64_t decay, double final) {
  return {std::move(kind), warmup, decay, final};
}

TEST(Schedule, ConstantIsOneAfterALinearWarmUp) {
  const ScheduleConfig s = schedule("constant", 4, 0, 0);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 1, 100), 0.25);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 4, 100), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 99, 100), 1);
}

TEST(Schedule, CosineEndsAtFinalAndIsHalfWayInTheMiddle) {
  const ScheduleConfig s = schedule("cosine", 10, 0, 0.1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 10, 110), 1);
  EXPECT_NEAR(schedule_factor(s, 60, 110), 0.55, 1e-15);  // cos(pi/2) to rounding
  EXPECT_NEAR(schedule_factor(s, 35, 110), 0.1 + 0.9 * 0.5 * (1 + std::cos(std::numbers::pi / 4)),
              1e-15);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 110, 110), 0.1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 200, 110), 0.1);
  EXPECT_DOUBLE_EQ(schedule_factor(schedule("cosine", 0, 50, 0), 50, 1000), 0);
}

TEST(Schedule, WsdIsFlatThenLinear) {
  const ScheduleConfig s = schedule("wsd", 5, 20, 0);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 5, 100), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 80, 100), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 90, 100), 0.5);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 100, 100), 0);
}

}  // namespace
}  // namespace orthrus::optim
