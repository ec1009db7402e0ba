// When classes are learned, by accuracies whose half is known.
#include <gtest/gtest.h>

#include "runtime/cli/learning_times.hpp"

namespace orthrus::cli {
namespace {

// Of accuracies that grow linearly, the half is where the line says, between evaluations, too.
TEST(LearningTimes, AreWhereHalfOfTheLastAccuracyIsReached) {
  LearningTimes times;
  for (const double step : {0.0, 30.0, 70.0, 100.0}) {
    times.add(step, {{"class_0_accuracy", step / 100},
                     {"class_1_accuracy", step >= 70 ? 0.8 : 0},
                     {"val_accuracy", 1},
                     {"class_0_loss", 1}});
  }
  EXPECT_EQ(times.times().size(), 2U);
  EXPECT_DOUBLE_EQ(times.times()["class_0"].get<double>(), 50);
  EXPECT_DOUBLE_EQ(times.times()["class_1"].get<double>(), 50);  // half of the way from 30 to 70
  EXPECT_DOUBLE_EQ(times.ratio().get<double>(), 1);
}

TEST(LearningTimes, OfClassesThatAreNotLearnedAreNull) {
  LearningTimes times;
  EXPECT_TRUE(times.times().empty());
  EXPECT_TRUE(times.ratio().is_null());
  for (const double step : {0.0, 10.0, 20.0}) {
    times.add(step, {{"decile_0_accuracy", step / 20}, {"decile_9_accuracy", 0}});
  }
  EXPECT_DOUBLE_EQ(times.times()["decile_0"].get<double>(), 10);
  EXPECT_TRUE(times.times()["decile_9"].is_null());
  EXPECT_TRUE(times.ratio().is_null()) << "nobody knows how slow the slowest is";
}

// The accuracy that counts is the last: what was forgotten was not learned.
TEST(LearningTimes, AreOfTheLastAccuracy) {
  LearningTimes times;
  for (const auto& [step, accuracy] : {std::pair{0.0, 0.0}, {10, 0.9}, {20, 0.2}})
    times.add(step, {{"class_0_accuracy", accuracy}, {"class_1_accuracy", step / 20}});
  EXPECT_DOUBLE_EQ(times.times()["class_0"].get<double>(), 10 * 0.1 / 0.9);
  EXPECT_DOUBLE_EQ(times.ratio().get<double>(), 10 / (10 * 0.1 / 0.9));
}

}  // namespace
}  // namespace orthrus::cli
