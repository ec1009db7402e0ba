// Averaged weights: they are what they are said to be, and the training does not notice.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <orthrus/communicator.hpp>
#include <orthrus/error.hpp>
#include <string>
#include <vector>

#include "runtime/cli/training.hpp"

namespace orthrus::cli {
namespace {

constexpr double halflife = 40;  // examples: five steps

Config config_of(int stage) {
  return parse_config(
      "schema: 1\nname: q\nseed: 3\nworkload: {name: noisy_quadratic, rows: 8, cols: 12}\n"
      "train: {steps: 30, batch: 8}\nzero: {stage: " +
      std::to_string(stage) +
      "}\ngroups:\n  - {match: \"*\", rule: {name: muon, lr: 0.1}, lmo: {scale: original}}\n");
}

class AnAverage : public testing::TestWithParam<std::pair<int, int>> {};  // ranks, ZeRO stage

TEST_P(AnAverage, HalvesWhatIsAHalfLifeOldAndLeavesTheTrainingAsItWas) {
  const auto [ranks, stage] = GetParam();
  run_thread_ranks(ranks, [stage = stage](Communicator& world) {
    const Config config = config_of(stage);
    Training with(config, world.duplicate("a"), world.duplicate("b"));
    Training without(config, world.duplicate("c"), world.duplicate("d"));
    with.keep_average(halflife);
    std::vector<std::vector<double>> expected;
    const auto visit = [&](const auto& take) {
      with.optimizer().gather(with.ids());
      for (const int id : with.ids()) {
        const auto* const now = static_cast<const float*>(with.optimizer().weights(id));
        take(static_cast<std::size_t>(id), now,
             elements_of(with.parameters()[static_cast<std::size_t>(id)]));
      }
      with.optimizer().release(with.ids());
    };
    visit([&](std::size_t, const float* now, std::int64_t n) {
      expected.emplace_back(now, now + n);
    });
    EXPECT_EQ(with.evaluate_average(), with.evaluate()) << "it begins with the initial weights";

    const double kept = std::exp2(-8 / halflife);
    for (int step = 0; step < 30; ++step) {
      const double loss = with.step([] { return Training::Word{}; }).loss;
      EXPECT_EQ(loss, without.step([] { return Training::Word{}; }).loss);
      if (step % 7 == 0) static_cast<void>(with.evaluate_average());
      visit([&](std::size_t id, const float* now, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) {
          double& e = expected[id][static_cast<std::size_t>(i)];
          e = kept * e + (1 - kept) * static_cast<double>(now[i]);
        }
      });
    }
    EXPECT_EQ(with.evaluate(), without.evaluate());

    // The same objective, at weights that were averaged here.
    const auto other = workloads::open_workload(config);
    const std::vector<Parameter> parameters = other->parameters();
    for (std::size_t id = 0; id < parameters.size(); ++id) {
      const std::vector<float> values(expected[id].begin(), expected[id].end());
      std::memcpy(parameters[id].weights, values.data(), values.size() * sizeof(float));
    }
    const workloads::Workload::Evaluation judged = other->evaluate(0, 1);
    const double loss = judged.sums.at("val_loss") / judged.count;
    EXPECT_NEAR(with.evaluate_average().at("val_loss"), loss, 1e-5 * loss);  // f32
    EXPECT_GT(std::abs(with.evaluate().at("val_loss") - loss), 1e-2 * loss);
  });
}

INSTANTIATE_TEST_SUITE_P(Stages, AnAverage,
                         testing::Values(std::pair(1, 1), std::pair(2, 2), std::pair(2, 3)));

}  // namespace
}  // namespace orthrus::cli
