// A step fits one line, and a bar fits the terminal.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "runtime/cli/progress.hpp"

namespace orthrus::cli {
namespace {

StepLine example() {
  StepLine line;
  line.step = 120;
  line.steps = 1000;
  line.loss = 3.2146;
  line.step_ms = 412.3;
  line.ms.reduce = 61.2;
  line.ms.lmo = 188.4;
  line.ms.gather = 44.0;
  line.bytes_sent = 1.94e9;
  line.update_rms = {0.199};
  return line;
}

TEST(StepLine, ReadsAsPromised) {
  EXPECT_EQ(format_step(example()),
            "step   120 | 412 ms | reduce 61 | lmo 188 | gather 44 | sent 1.94 GB | update rms "
            "0.199 | loss 3.215");
}

TEST(StepLine, EndsWithWhatWasEvaluated) {
  StepLine line = example();
  line.validation = {{"val_accuracy", 0.9375}, {"val_loss", 3.25}};
  EXPECT_TRUE(format_step(line).ends_with(" | loss 3.215 | val_accuracy 0.9375 | val_loss 3.25"));
}

TEST(StepLine, OfASkippedStepSaysSo) {
  StepLine line = example();
  line.skipped = true;
  EXPECT_EQ(format_step(line), "step   120 | 412 ms | skipped: a gradient is not finite");
}

TEST(Bar, NeverLeavesItsWidth) {
  for (int width = 0; width <= 200; ++width) {
    for (const std::int64_t step : {0, 1, 500, 1000}) {
      EXPECT_LE(format_bar(step, 1000, 2.5, 3.0, width).size(), static_cast<std::size_t>(width));
    }
  }
}

TEST(Bar, FillsWithTheRun) {
  EXPECT_EQ(format_bar(500, 1000, 2.5, 2.0, 64),
            "500/1000 [=======>      ] loss 2.5 | 2 steps/s | 4 min 10 s left");
  const std::string full = format_bar(1000, 1000, 2.5, 0, 40);
  EXPECT_EQ(full.find('>'), std::string::npos);
  EXPECT_NE(full.find("=]"), std::string::npos);
  EXPECT_EQ(full.size(), 40U);
}

TEST(Bar, OfADivergedRunStaysALine) {
  EXPECT_NE(format_bar(1, 10, std::nan(""), 1, 60).find("loss nan"), std::string::npos);
}

}  // namespace
}  // namespace orthrus::cli
