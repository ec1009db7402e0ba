// Lion against its formula in f64.
#include <gtest/gtest.h>

#include "runner.hpp"

namespace orthrus::optim {
namespace {

double sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

TEST(Lion, IsItsFormulaAcrossRuns) {
  const double lr = 0.01, wd = 0.1, b1 = 0.9, b2 = 0.99;
  const Index rows = 3,
              cols = 7000;  // 21,000 elements: more than one run, the last one ragged
  Matrix w = zoo::gaussian(rows, cols, 1);
  Runner run(
      rule("lion", {{"lr", lr}, {"weight_decay", wd}, {"betas", std::vector<double>{b1, b2}}}), w);
  Matrix m(rows, cols);
  for (int t = 1; t <= 5; ++t) {
    // Multiples of 2^-6 of few bits: no sum comes close enough to 0 for f32 to
    // see another sign.
    Matrix g = zoo::gaussian(rows, cols, 10 + static_cast<std::uint64_t>(t));
    for (double& v : g.data) v = std::round(v * 64) / 64 + 0x1p-8;
    double sum = 0;
    for (std::size_t i = 0; i < w.data.size(); ++i) {
      const double x = b1 * m.data[i] + (1 - b1) * g.data[i];
      const double u = std::abs(x) < 1e-7 ? 0 : sign(x);
      m.data[i] = b2 * m.data[i] + (1 - b2) * g.data[i];
      w.data[i] = (1 - lr * wd) * w.data[i] - lr * u;
      sum += u * u;
    }
    EXPECT_EQ(run.step(g), sum);
  }
  EXPECT_LE(zoo::relative_error(run.weights, w), f32_bound);
}

TEST(Lion, TheSignOfZeroIsZero) {
  Runner run(rule("lion", {{"lr", 1.0}}), zoo::gaussian(2, 3, 4));
  const auto before = run.weights;
  EXPECT_EQ(run.step(zoo::zero(2, 3)), 0);
  EXPECT_EQ(run.weights.data, before.data);
}

}  // namespace
}  // namespace orthrus::optim
