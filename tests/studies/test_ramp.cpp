// Batches that grow with noise, and how smooth a loss is along its path.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/studies/ramp.hpp>
#include <orthrus/studies/smoothness.hpp>
#include <vector>

#include "runtime/studies/dense.hpp"
#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

using testing::HasSubstr;

TEST(BatchRamp, FollowsTheNoiseScaleAndNeverFalls) {
  BatchRamp::Options options;
  options.ranks = 4;
  options.most_local = 8;
  options.most = 400;
  options.every = 10;
  options.warmup_steps = 15;
  BatchRamp ramp(16, options);
  EXPECT_EQ(ramp.now().batch, 16);
  EXPECT_EQ(ramp.decide(20).batch, 16) << "nothing is known yet";
  for (int t = 0; t < 200; ++t) ramp.add(100, 1);
  EXPECT_NEAR(ramp.noise_scale(), 100, 1e-9);
  EXPECT_FALSE(ramp.decide(10).changed) << "warm-up";
  EXPECT_FALSE(ramp.decide(25).changed) << "between decisions";
  // 60 examples: 15 a rank, in two micro-batches of 8.
  const BatchRamp::Decision& d = ramp.decide(30);
  EXPECT_TRUE(d.changed);
  EXPECT_EQ(d.micro_batches, 2);
  EXPECT_EQ(d.local, 8);
  EXPECT_EQ(d.batch, 64);
  EXPECT_DOUBLE_EQ(d.lr_multiplier, 2) << "of four times the first batch";
  for (int t = 0; t < 200; ++t) ramp.add(1, 1);
  EXPECT_EQ(ramp.decide(40).batch, 64) << "it never falls";
  EXPECT_FALSE(ramp.now().changed);
  for (int t = 0; t < 200; ++t) ramp.add(1e6, 1);
  EXPECT_EQ(ramp.decide(50).batch, 364) << "100 a rank are 13 of at most 8, and 4·13·8 too many";
}

TEST(BatchRamp, StaysWithoutSignal) {
  BatchRamp ramp(8, {});
  for (int t = 0; t < 5; ++t) ramp.add(3, -1);
  EXPECT_TRUE(std::isinf(ramp.noise_scale()));
  EXPECT_EQ(ramp.decide(100).batch, 8);
  // Averages are of both, before they are divided.
  BatchRamp mixed(8, {});
  mixed.add(100, 1);
  mixed.add(0, 3);
  EXPECT_NEAR(mixed.noise_scale(), 0.09 * 100 / (0.09 + 0.3), 1e-9);
}

TEST(BatchRamp, PaysLeastAtItsPrice) {
  BatchRamp::Options options;
  options.price = {
      .step = 2, .example = 0.5, .second = 3, .step_seconds = 0.1, .example_seconds = 0.01};
  BatchRamp ramp(8, options);
  ramp.add(500, 1);
  const double step = 2 + 3 * 0.1, example = 0.5 + 3 * 0.01;
  const auto cost = [&](double b) { return (1 + 500 / b) * step + (b + 500) * example; };
  double best = 1;
  for (double b = 1; b < 1000; b += 0.01) {
    if (cost(b) < cost(best)) best = b;
  }
  EXPECT_NEAR(ramp.wanted(), best, 0.01);
  EXPECT_EQ(ramp.objective(), "2 per step + 0.5 per example + 3 per second");
  EXPECT_EQ(BatchRamp(8, {}).objective(), "none: 0.6 of the noise scale");
}

TEST(BatchRamp, GoesOnFromItsState) {
  BatchRamp::Options options;
  options.every = 10;
  options.micro_batches = 2;  // on one rank noise shows between them
  BatchRamp ramp(8, options);
  ramp.add(100, 1);
  EXPECT_EQ(ramp.decide(10).batch, 60);
  EXPECT_EQ(ramp.now().micro_batches, 2);
  ramp.add(300, 1);
  BatchRamp again(8, options);
  again.restore(ramp.state());
  EXPECT_EQ(again.now().batch, 60);
  EXPECT_EQ(again.noise_scale(), ramp.noise_scale());
  EXPECT_EQ(again.decide(20).batch, ramp.decide(20).batch);
  EXPECT_GT(again.now().batch, 60);
  EXPECT_DOUBLE_EQ(again.now().lr_multiplier, ramp.now().lr_multiplier);
}

TEST(BatchRamp, WaitsForSecondsThatArePaid) {
  BatchRamp::Options options;
  options.every = 1;
  options.price.second = 1;
  BatchRamp ramp(8, options);
  ramp.add(100, 1);
  EXPECT_EQ(ramp.decide(1).batch, 8) << "nobody has said what a step takes";
  ramp.set_seconds(0.09, 0.01);
  EXPECT_EQ(ramp.decide(2).batch, 30);  // √(100·9)
}

TEST(BatchRamp, NamesWhatIsWrong) {
  const auto refusal = [](std::int64_t batch, const BatchRamp::Options& o) -> std::string {
    try {
      const BatchRamp ramp(batch, o);
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "accepted";
  };
  BatchRamp::Options o;
  o.ranks = 3;
  EXPECT_THAT(refusal(8, o), HasSubstr("multiple of ranks"));
  EXPECT_EQ(refusal(9, o), "accepted");
  o.price.step = 1;
  EXPECT_THAT(refusal(9, o), HasSubstr("cost of a step and of an example"));
  o = {};
  o.decay = 1;
  EXPECT_THAT(refusal(8, o), HasSubstr("decay"));
  o = {};
  o.most = 4;
  EXPECT_THAT(refusal(8, o), HasSubstr("most"));
}

TEST(Smoothness, OfAQuadraticIsItsCurvature) {
  Random random(2);
  // f(W) = ½·Σ c_i·‖W_i‖_F²: ∇f = c·W; along Δ the curvature is Σc‖Δ‖².
  const double curvature = 3;
  Matrix w(5, 7), step(5, 7);
  for (double& x : w.values) x = random.normal();
  for (double& x : step.values) x = 0.1 * random.normal();
  Matrix before = w, after = w;
  add(after, 1, step);
  for (double& x : before.values) x *= curvature;
  for (double& x : after.values) x *= curvature;
  const std::vector<ConstMatrixView> g0{before.view()}, g1{after.view()}, d{step.view()};
  EXPECT_NEAR(path_smoothness(DescentNorm::frobenius, g0, g1, d), curvature, 1e-12);
  // In the pair of spectral and nuclear norms: c·‖Δ‖_*/‖Δ‖_op.
  const std::vector<double> s = singular_values(step);
  double nuclear = 0;
  for (const double x : s) nuclear += x;
  EXPECT_NEAR(path_smoothness(DescentNorm::spectral, g0, g1, d), curvature * nuclear / s[0], 1e-10);
  // Of two equal matrices dual norms add, and the step is as long.
  const std::vector<ConstMatrixView> g0s{g0[0], g0[0]}, g1s{g1[0], g1[0]}, ds{d[0], d[0]};
  EXPECT_NEAR(path_smoothness(DescentNorm::frobenius, g0s, g1s, ds), 2 * curvature, 1e-12);
  const double f0 = 0.5 * curvature * dot(w, w);
  Matrix moved = w;
  add(moved, 1, step);
  const double f1 = 0.5 * curvature * dot(moved, moved);
  EXPECT_NEAR(directional_smoothness(f0, f1, dot(before, step), frobenius(step)), curvature, 1e-9);
  const Matrix none(5, 7);
  const std::vector<ConstMatrixView> zero{none.view()};
  EXPECT_THROW(static_cast<void>(path_smoothness(DescentNorm::sign, g0, g1, zero)), NumericError);
  EXPECT_THROW(static_cast<void>(directional_smoothness(1, 2, 0, 0)), NumericError);
  const SmoothnessSummary all = summarize_smoothness({5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11});
  EXPECT_EQ(all.median, 6);
  EXPECT_EQ(all.upper, 10);
}

}  // namespace
}  // namespace orthrus::studies
