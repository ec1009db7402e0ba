// The bounds hold on runs they speak of, and their minimizers minimize.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <orthrus/error.hpp>
#include <orthrus/studies/theory.hpp>
#include <vector>

#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

TEST(MomentumNoise, VarianceIsTheSumOfSquaredCoefficients) {
  for (const double beta : {0.0, 0.5, 0.9, 0.99}) {
    // Which coefficient each past gradient has in C, by running the recursion on a unit impulse.
    double momentum = 0, sum = 0;
    for (int t = 0; t < 4000; ++t) {
      const double g = t == 0 ? 1 : 0;
      momentum = beta * momentum + (1 - beta) * g;
      const double c = beta * momentum + (1 - beta) * g;
      sum += c * c;
    }
    EXPECT_NEAR(momentum_variance(beta), sum, 1e-14);
    EXPECT_NEAR(effective_batch(8, beta) * sum, 8, 1e-10);
    // A bound on the same thing: the triangle inequality instead of independence.
    EXPECT_GE(momentum_noise(beta) * momentum_noise(beta), momentum_variance(beta) - 1e-15);
  }
  EXPECT_DOUBLE_EQ(momentum_variance(0), 1);
  EXPECT_DOUBLE_EQ(momentum_noise(0), 1);
}

TEST(StepsBatchLaw, StepsToInvertsLevelAndTokensAreLeastAtItsOptimum) {
  Random random(1);
  for (int k = 0; k < 50; ++k) {
    const StepsBatchLaw law{random.uniform(), 1 + 10 * random.uniform(), 0.5 + random.uniform(),
                            1 + 10 * random.uniform(), 0.3 + random.uniform()};
    const double target = law.floor + 0.2 + random.uniform();
    const double best = law.token_optimal_batch(target);
    const auto tokens = [&](double b) { return b * law.steps_to(target, b); };
    EXPECT_NEAR(law.level(law.steps_to(target, best), best), target, 1e-10 * target);
    for (const double factor : {0.9, 0.99, 1.01, 1.1}) {
      EXPECT_GT(tokens(factor * best), tokens(best)) << factor;
    }
    const double too_small =
        std::pow(law.batch_factor / (target - law.floor), 1 / law.batch_exponent);
    EXPECT_TRUE(std::isinf(law.steps_to(target, 0.999 * too_small)));
    EXPECT_TRUE(std::isfinite(law.steps_to(target, 1.001 * too_small)));
  }
  EXPECT_THROW((void)StepsBatchLaw{1}.token_optimal_batch(1), ConfigError);
}

/// Normalized descent on ½Σhᵢ(xᵢ − x*ᵢ)² with momentum, decay and noise of σ² per example,
/// Euclidean: what the assumptions say, with L = max h and D = 1.
struct Descent {
  Assumptions a;
  double lr, batch;
  int steps;
  double mean_gap = 0, mean_norm = 0, end = 0, rho = 0;
};

Descent descend(double beta, double lambda, double lr, double batch, double sigma, int steps) {
  constexpr std::size_t d = 6;
  const std::array<double, d> h{1, 0.7, 0.5, 0.2, 0.1, 0.05};
  const std::array<double, d> best{0.3, -0.2, 0.5, 0.1, -0.4, 0.2};  // ‖·‖ < 1/λ
  Descent run{{}, lr, batch, steps};
  run.a.momentum = beta;
  run.a.weight_decay = lambda;
  run.a.noise = sigma;
  constexpr int repetitions = 40;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    Random random(2, static_cast<std::uint64_t>(repetition));
    std::array<double, d> x{}, m{}, g{}, noisy{}, c{};
    const auto gradient = [&] {
      for (std::size_t i = 0; i < d; ++i) g[i] = h[i] * (x[i] - best[i]);
    };
    const auto length = [&](const std::array<double, d>& v) {
      double sum = 0;
      for (const double e : v) sum += e * e;
      return std::sqrt(sum);
    };
    const auto loss = [&] {
      double sum = 0;
      for (std::size_t i = 0; i < d; ++i) sum += h[i] * (x[i] - best[i]) * (x[i] - best[i]) / 2;
      return sum;
    };
    gradient();
    run.a.gap = loss();
    run.a.gradient_norm = run.a.momentum_error = length(g);  // M_0 = 0
    for (int t = 0; t < steps; ++t) {
      gradient();
      double inner = 0;
      for (std::size_t i = 0; i < d; ++i) inner += g[i] * x[i];
      run.mean_gap += (inner + length(g) / lambda) / steps / repetitions;
      run.mean_norm += length(g) / steps / repetitions;
      for (std::size_t i = 0; i < d; ++i) {
        noisy[i] = g[i] + sigma / std::sqrt(batch * d) * random.normal();
        m[i] = beta * m[i] + (1 - beta) * noisy[i];
        c[i] = beta * m[i] + (1 - beta) * noisy[i];
      }
      const double norm = length(c);
      for (std::size_t i = 0; i < d; ++i) x[i] = (1 - lambda * lr) * x[i] - lr * c[i] / norm;
      run.rho = std::max(run.rho, lambda * length(x));
    }
    run.end += loss() / repetitions;
  }
  return run;
}

TEST(Bounds, HoldOnNoisyQuadratics) {
  int informative = 0;
  for (const double beta : {0.0, 0.5, 0.9}) {
    for (const double lr : {0.003, 0.03}) {
      for (const double sigma : {0.0, 0.3}) {
        const Descent run = descend(beta, 0.5, lr, 16, sigma, 600);
        const double gap = FrankWolfeGap(run.a).bound(run.steps, run.batch, lr);
        EXPECT_LE(run.mean_gap, gap) << beta << " " << lr << " " << sigma;
        const double last = StarConvex(run.a).bound(run.steps, run.batch, lr);
        EXPECT_LE(run.end, last) << beta << " " << lr << " " << sigma;
        EXPECT_LE(run.mean_norm, form_b(run.a, lr, run.rho).level(run.steps, run.batch));
        EXPECT_LT(run.rho, 1);  // ‖W‖ stays in the ball of 1/λ
        // A bound above where the run began would say nothing.
        if (last < run.a.gap) ++informative;
      }
    }
  }
  EXPECT_GE(informative, 2);
}

TEST(FrankWolfeGap, BestBatchWithMomentumErrorIsNoWorseThanAGrid) {
  Assumptions a;
  a.weight_decay = 0.1;
  a.noise = 10;
  a.momentum_error = 50;
  const FrankWolfeGap bound(a);
  constexpr double examples = 1e8;
  const BatchAndLr best = best_batch(a, bound, examples);
  double least = 1e300, at = 0;
  for (double x = 0; x < 14; x += 0.01) {
    for (double y = -12; y < 0; y += 0.02) {
      const double b = std::exp(x), value = bound.bound(examples / b, b, std::exp(y));
      if (value < least) {
        least = value;
        at = b;
      }
    }
  }
  EXPECT_LE(best.bound, least * (1 + 1e-12));
  EXPECT_GT(best.bound, least * (1 - 1e-3));
  EXPECT_NEAR(std::log(best.batch / at), 0, 0.05);
  a.momentum_error = 0;
  EXPECT_GT(best_batch(a, FrankWolfeGap(a), examples).batch, 1.05 * best.batch);
  // What E0 adds is 2β/(1−β)·E0/(λT).
  EXPECT_NEAR(bound.bound(100, 8, 0.1) - FrankWolfeGap(a).bound(100, 8, 0.1),
              2 * 0.9 / 0.1 * 50 / (0.1 * 100), 1e-9);
}

TEST(StarConvex, BestLrIsNoWorseThanAGrid) {
  Assumptions a;
  a.weight_decay = 0.1;
  a.momentum_error = 1;
  for (const double mu : {1.0, 0.3}) {
    const StarConvex bound(a, mu);
    const double best = bound.bound(1e6, 1e4, bound.best_lr(1e6));
    for (double y = -14; y < 0; y += 0.01) {
      EXPECT_LE(best, bound.bound(1e6, 1e4, std::exp(y)) * (1 + 1e-12));
    }
  }
  // 1/μ before noise and L, not before E0.
  Assumptions still = a;
  still.momentum_error = 0;
  const double of_error = StarConvex(a).lr_term - StarConvex(still).lr_term;
  EXPECT_NEAR(of_error, 2 * 0.9 / 0.1, 1e-9);
  EXPECT_NEAR(StarConvex(a, 0.25).lr_term, 4 * StarConvex(still).lr_term + of_error, 1e-9);
  EXPECT_NEAR(StarConvex(a, 0.25).batch_term, 4 * StarConvex(a).batch_term, 1e-9);
  // A smaller constant: slower, noisier.
  EXPECT_GT(StarConvex(a, 0.3).bound(1e5, 100, 1e-4), StarConvex(a).bound(1e5, 100, 1e-4));
}

TEST(CriticalWeightDecay, IsTheRootWithMomentumError) {
  Assumptions a;
  a.gap = 3;
  a.momentum_error = 7;
  constexpr double steps = 5000;
  const double root = critical_weight_decay(a, steps);
  a.weight_decay = root * 1.0001;
  EXPECT_GT(StarConvex(a).best_lr(steps), 0);
  a.weight_decay = root * 0.9999;
  EXPECT_EQ(StarConvex(a).best_lr(steps), 0);
}

TEST(LearningRates, FollowTheirRules) {
  EXPECT_DOUBLE_EQ(scaled_lr(LrRule::constant, 0.1, 8, 128), 0.1);
  EXPECT_DOUBLE_EQ(scaled_lr(LrRule::sqrt, 0.1, 8, 128), 0.4);
  EXPECT_DOUBLE_EQ(scaled_lr(LrRule::linear, 0.1, 8, 128), 1.6);
  // ε(B) = 2ε_max/(√(Bn/B) + √(B/Bn)): greatest at B_n, the same at B_n·k and B_n/k.
  EXPECT_DOUBLE_EQ(scaled_lr(LrRule::surge, 0.1, 100, 400, 100), 0.1 * 2 / (0.5 + 2));
  EXPECT_NEAR(scaled_lr(LrRule::surge, 0.1, 25, 400, 100), 0.1, 1e-15);
  EXPECT_DOUBLE_EQ(optimal_step(3, 50, 50), 1.5);
  EXPECT_NEAR(scaled_momentum(0.9, 32, 64), 0.81, 1e-15);
  // τ = B/(ηλD) at D = 1: before and after.
  const double decay = scaled_weight_decay(0.1, 0.02, 32, 0.05, 256);
  EXPECT_NEAR(256 / (0.05 * decay), 32 / (0.02 * 0.1), 1e-9);
  EXPECT_THROW((void)scaled_lr(LrRule::surge, 0.1, 8, 16), ConfigError);
}

TEST(Theory, RefusesWhatItCannotMean) {
  EXPECT_THROW((void)momentum_noise(1), ConfigError);
  EXPECT_THROW((void)momentum_variance(-0.1), ConfigError);
  EXPECT_THROW(FrankWolfeGap{Assumptions{}}, ConfigError);  // no weight decay
  Assumptions a;
  a.distortion = 0;
  EXPECT_THROW((void)form_a(a, 0.1, 0), ConfigError);
  EXPECT_THROW((void)form_b(Assumptions{}, 0.1, 1), ConfigError);
}

}  // namespace
}  // namespace orthrus::studies
