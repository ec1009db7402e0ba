// Lion against its formula in f64.
#include <gtest/gtest.h>

#include "runner.hpp"

namespace orthrus::optim {
namespace {

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// Gradients of 0.5 to 1.5 that turn round in the fourth step: with betas (0.9, 0.99) the gradient
// then outvotes the momentum, with (0.99, 0.9) it does not, and either way no vote is closer than
// 0.01: f32 counts alike.
TEST(Lion, IsItsFormulaAcrossRuns) {
  for (const bool gradient_rules : {true, false}) {
    const double lr = 0.01, wd = 0.1;
    const double b1 = gradient_rules ? 0.9 : 0.99;
    const double b2 = gradient_rules ? 0.99 : 0.9;
    const Index rows = 3, cols = 7000;  // 21,000 elements: more than one run, the last one ragged
    Matrix w = zoo::gaussian(rows, cols, 1);
    Runner run(
        rule("lion", {{"lr", lr}, {"weight_decay", wd}, {"betas", std::vector<double>{b1, b2}}}),
        w);
    const Matrix noise = zoo::gaussian(rows, cols, 2);
    Matrix m(rows, cols);
    int turned = 0;
    for (int t = 1; t <= 5; ++t) {
      Matrix g(rows, cols);
      double sum = 0;
      for (std::size_t i = 0; i < w.data.size(); ++i) {
        const double size = 0.5 + std::abs(std::fmod(noise.data[i] * t, 1.0));
        g.data[i] = (noise.data[i] > 0 ? size : -size) * (t == 4 ? -1 : 1);
        const double u = sign(b1 * m.data[i] + (1 - b1) * g.data[i]);
        turned += u != sign(noise.data[i]) ? 1 : 0;
        m.data[i] = b2 * m.data[i] + (1 - b2) * g.data[i];
        w.data[i] = (1 - lr * wd) * w.data[i] - lr * u;
        sum += u * u;
      }
      EXPECT_EQ(run.step(g), sum);
    }
    EXPECT_EQ(turned, gradient_rules ? rows * cols : 0);
    EXPECT_LE(zoo::relative_error(run.weights, w), f32_bound);
  }
}

TEST(Lion, TheSignOfZeroIsZero) {
  Runner run(rule("lion", {{"lr", 1.0}}), zoo::gaussian(2, 3, 4));
  const auto before = run.weights;
  EXPECT_EQ(run.step(zoo::zero(2, 3)), 0);
  EXPECT_EQ(run.weights.data, before.data);
}

}  // namespace
}  // namespace orthrus::optim
