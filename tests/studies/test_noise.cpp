// Noise estimates are unbiased, and the same however gradients are spread over ranks.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/noise.hpp>

#include "runtime/studies/dense.hpp"
#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

using Vector = std::vector<double>;

double squared(const Vector& v) { return std::inner_product(v.begin(), v.end(), v.begin(), 0.0); }

Vector mean_of(const std::vector<Vector>& all) {
  Vector mean(all[0].size(), 0.0);
  for (const Vector& v : all) {
    for (std::size_t i = 0; i < v.size(); ++i) mean[i] += v[i] / static_cast<double>(all.size());
  }
  return mean;
}

std::vector<Vector> draw(std::size_t count, std::size_t size, Random& random) {
  std::vector<Vector> all(count, Vector(size));
  for (Vector& v : all) {
    for (double& x : v) x = 0.3 + random.normal();
  }
  return all;
}

TEST(DistributedNoise, IsTheTwoBatchEstimate) {
  Random random(1);
  const std::vector<Vector> g = draw(8, 50, random);
  double q = 0;
  for (const Vector& v : g) q += squared(v) / 8;
  const double r = squared(mean_of(g));
  const NoiseProbe spread = distributed_noise(8, 4, q, r);
  const NoiseProbe pair = two_batch_noise(4, q, 32, r);
  EXPECT_NEAR(spread.trace, pair.trace, 1e-10 * std::abs(pair.trace));
  EXPECT_NEAR(spread.signal, pair.signal, 1e-10 * std::abs(pair.trace));
}

TEST(DistributedNoise, IsTheSameForRanksTimesMicroSteps) {
  Random random(2);
  const std::vector<Vector> g = draw(8, 64, random);
  const auto estimate = [&](std::size_t ranks, std::size_t shards) {
    // Each rank adds up its own squared norms, then ranks add; the mean's norm comes from shards.
    double q = 0, r = 0;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      double own = 0;
      for (std::size_t i = rank * 8 / ranks; i < (rank + 1) * 8 / ranks; ++i) own += squared(g[i]);
      q += own / 8;
    }
    const Vector mean = mean_of(g);
    for (std::size_t s = 0; s < shards; ++s) {
      const auto at = [&](std::size_t k) { return mean.begin() + static_cast<std::ptrdiff_t>(k); };
      r += squared(Vector(at(s * 64 / shards), at((s + 1) * 64 / shards)));
    }
    return distributed_noise(8, 4, q, r);
  };
  const NoiseProbe one = estimate(1, 1);
  for (const std::size_t ranks : {2, 4, 8}) {
    for (const std::size_t shards : {1, 2, 4}) {
      EXPECT_NEAR(estimate(ranks, shards).trace / one.trace, 1, 1e-12);
      EXPECT_NEAR(estimate(ranks, shards).signal / one.signal, 1, 1e-11);
    }
  }
}

TEST(DistributedNoise, IsUnbiasedForUnequalCounts) {
  // Per-example noise of variance 1 in 20 dimensions, |G|² = 20·0.09.
  const Vector counts{1, 2, 5, 12};
  const double total = 20;
  double trace = 0, signal = 0, equal_signal = 0;
  constexpr int repetitions = 20000;
  for (int k = 0; k < repetitions; ++k) {
    Random random(3, static_cast<std::uint64_t>(k));
    Vector squares;
    Vector mean(20, 0.0);
    for (const double t : counts) {
      Vector g(20);
      for (std::size_t i = 0; i < 20; ++i) {
        g[i] = 0.3 + random.normal() / std::sqrt(t);
        mean[i] += t / total * g[i];
      }
      squares.push_back(squared(g));
    }
    const NoiseProbe probe = distributed_noise(counts, squares, squared(mean));
    trace += probe.trace / repetitions;
    signal += probe.signal / repetitions;
    // Averaged as if all counts were alike, small ones would count too much.
    const double q = std::accumulate(squares.begin(), squares.end(), 0.0) / 4;
    equal_signal += distributed_noise(4, 5, q, squared(mean)).signal / repetitions;
  }
  EXPECT_NEAR(trace, 20, 0.2);     // 20000 probes of CV 0.2: 0.14 % standard error; six of them
  EXPECT_NEAR(signal, 1.8, 0.06);  // CV 0.7: 0.5 %
  EXPECT_GT(std::abs(equal_signal - 1.8), 0.3);
  // Equal counts: the plain formula.
  const NoiseProbe a = distributed_noise(Vector{4, 4}, Vector{3, 5}, 2.5);
  const NoiseProbe b = distributed_noise(2, 4, 4, 2.5);
  EXPECT_NEAR(a.trace, b.trace, 1e-12);
  EXPECT_NEAR(a.signal, b.signal, 1e-12);
}

TEST(NoiseScale, DividesAveragesAndSaysWhenItCannot) {
  NoiseScale scale;
  EXPECT_TRUE(scale.value().unresolved);
  EXPECT_EQ(scale.trend(), 0);
  Random random(4);
  for (int k = 0; k < 400; ++k) {
    scale.add({100 + 5 * random.normal(), 2 + 3 * random.normal()});  // often negative
  }
  const NoiseScale::Value value = scale.value();
  EXPECT_FALSE(value.unresolved);  // 2 against a standard error of 0.15
  EXPECT_NEAR(value.scale, 50, 12);
  EXPECT_LT(value.interval.lo, value.scale);
  EXPECT_GT(value.interval.hi, value.scale);
  EXPECT_LT(value.interval.hi, 75);
  NoiseScale weak;
  for (int k = 0; k < 20; ++k) weak.add({100, 0.1 + 3 * random.normal()});
  EXPECT_TRUE(weak.value().unresolved);
  NoiseScale steady;
  steady.add({10, 2});
  steady.add({10, 2});
  EXPECT_DOUBLE_EQ(steady.trend(), 5);
  steady.add({100, 2});
  EXPECT_GT(steady.trend(), 5);
}

TEST(NoiseScale, BlocksWidenTheIntervalOfCorrelatedProbes) {
  NoiseScale scale;
  Random random(5);
  for (int k = 0; k < 60; ++k) {
    const double shift = random.normal();
    for (int j = 0; j < 5; ++j) scale.add({100 + 30 * shift, 10});
  }
  const auto width = [&](Index block) {
    const Interval i = scale.value(block).interval;
    return i.hi - i.lo;
  };
  // Five probes are one: √5 wider, a little less as blocks start anywhere.
  EXPECT_GT(width(5), 1.5 * width(1));
}

constexpr DescentNorm norms[] = {DescentNorm::frobenius, DescentNorm::sign, DescentNorm::spectral,
                                 DescentNorm::row, DescentNorm::column};

TEST(DescentNorms, DirectionsHaveUnitNormAndReachTheDualNorm) {
  Random random(6);
  for (const auto& [m, n] : {std::pair<Index, Index>{3, 5}, {5, 3}, {4, 4}, {1, 6}}) {
    Vector c(static_cast<std::size_t>(m * n)), other(c.size());
    for (double& x : c) x = random.normal();
    const ConstMatrixView view = matrix_view(std::as_const(c).data(), m, n);
    for (const DescentNorm which : norms) {
      const Vector a = descent_direction(which, view);
      const ConstMatrixView direction = matrix_view(a.data(), m, n);
      EXPECT_NEAR(norm(which, direction), 1, 1e-12);
      const double reached = -std::inner_product(a.begin(), a.end(), c.begin(), 0.0);
      EXPECT_NEAR(reached, dual_norm(which, view), 1e-11);
      // Nobody else of that norm reaches more.
      for (int k = 0; k < 20; ++k) {
        for (double& x : other) x = random.normal();
        const double length = norm(which, matrix_view(std::as_const(other).data(), m, n));
        EXPECT_LE(std::inner_product(other.begin(), other.end(), c.begin(), 0.0) / length,
                  reached * (1 + 1e-12));
      }
    }
  }
}

TEST(DualNoise, OfGaussianNoiseIsItsExpectation) {
  // i.i.d. entries of variance 4 in 6×10, over a common mean that must not matter.
  Random random(7);
  std::vector<Vector> g;
  std::vector<ConstMatrixView> views;
  for (int k = 0; k < 512; ++k) {
    Vector v(60);
    for (std::size_t e = 0; e < 60; ++e) v[e] = static_cast<double>(e) + 2 * random.normal();
    g.push_back(std::move(v));
  }
  for (const Vector& v : g) views.push_back(matrix_view(v.data(), Index{6}, Index{10}));
  EXPECT_NEAR(dual_noise(DescentNorm::frobenius, views), 240, 10);  // 256 pairs, CV 0.18: 1.1 %
  const NoiseDecay decay = dual_noise_decay(DescentNorm::frobenius, views);
  EXPECT_EQ(decay.batches.size(), 9U);  // 512 gradients down to 2
  EXPECT_NEAR(decay.exponent, -1, 0.15);
  for (std::size_t k = 0; k < 5; ++k) EXPECT_NEAR(decay.distortion[k], 1, 0.2);

  // C = 10·4·I₆: tr C^½ = 6·√40; Σ sd = 60·2; √trΣ = √240. b_s examples each are b_s times as
  // noisy.
  const DualNoise spectral = dual_noise_scale(DescentNorm::spectral, 1, views);
  EXPECT_NEAR(spectral.noise, 6 * std::sqrt(40.0), 0.6);
  EXPECT_NEAR(dual_noise_scale(DescentNorm::sign, 1, views).noise, 120, 2);
  EXPECT_NEAR(dual_noise_scale(DescentNorm::frobenius, 1, views).noise, std::sqrt(240.0), 0.3);
  EXPECT_NEAR(dual_noise_scale(DescentNorm::sign, 9, views).noise, 360, 6);
  // The mean of 512 has entries e ± 0.09: Σe = 1770.
  EXPECT_NEAR(dual_noise_scale(DescentNorm::sign, 1, views).signal, 1770, 6);
  // Tall or wide, the smaller side is taken.
  std::vector<ConstMatrixView> tall;
  for (const Vector& v : g) tall.push_back(matrix_view(v.data(), Index{10}, Index{6}));
  EXPECT_NEAR(dual_noise_scale(DescentNorm::spectral, 1, tall).noise, 6 * std::sqrt(40.0), 0.6);
  // Tensors add before squares are taken.
  DualNoise two = spectral;
  two += spectral;
  EXPECT_NEAR(two.scale(), spectral.scale(), 1e-12);
}

TEST(Noise, RefusesWhatShowsNone) {
  EXPECT_THROW((void)two_batch_noise(8, 1, 8, 1), ConfigError);
  EXPECT_THROW((void)distributed_noise(1, 4, 1, 1), ConfigError);
  EXPECT_THROW((void)distributed_noise(Vector{1, 2}, Vector{1}, 1), ShapeError);
  const Vector a(6, 1.0), bad{1, 2, 3, std::nan(""), 5, 6};
  const ConstMatrixView one[] = {matrix_view(a.data(), Index{2}, Index{3})};
  EXPECT_THROW((void)dual_noise(DescentNorm::sign, one), ShapeError);
  const ConstMatrixView shapes[] = {one[0], matrix_view(a.data(), Index{3}, Index{2})};
  EXPECT_THROW((void)dual_noise(DescentNorm::sign, shapes), ShapeError);
  const ConstMatrixView nan[] = {one[0], matrix_view(bad.data(), Index{2}, Index{3})};
  EXPECT_THROW((void)dual_noise(DescentNorm::sign, nan), NumericError);
  const ConstMatrixView same[] = {one[0], one[0]};
  EXPECT_THROW((void)dual_noise_scale(DescentNorm::row, 1, same), ConfigError);
}

TEST(ExampleNoise, IsTheCovarianceOfRows) {
  // Rows m + z with z of variance 4 in each of 30 columns: trΣ = 120, |G|² = ‖m‖².
  Random random(4);
  constexpr Index rows = 20000, cols = 30;
  Matrix g(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) g(i, j) = 0.1 * static_cast<double>(j) + 2 * random.normal();
  }
  const NoiseProbe found = example_noise(g.view());
  double signal = 0;
  for (Index j = 0; j < cols; ++j) signal += 0.01 * static_cast<double>(j * j);
  // Of n·30 squares: √(2/(n·30)) is .2 %; of the signal 2·√(trΣ/(30n)·signal…): .5.
  EXPECT_NEAR(found.trace, 120, 1);
  EXPECT_NEAR(found.signal, signal, 1);
  EXPECT_THROW(
      static_cast<void>(example_noise(ConstMatrixView{g.values.data(), 1, 3, 3, DType::f64})),
      ConfigError);
}

TEST(ExtrapolatedNoiseScale, IsTheInterceptOverOneOverN) {
  const auto scale = [](double n) { return 350 - 1600 / n; };
  EXPECT_NEAR(extrapolated_noise_scale(8, scale(8), 128, scale(128)), 350, 1e-10);
  EXPECT_THROW(static_cast<void>(extrapolated_noise_scale(8, 1, 8, 2)), ConfigError);
  EXPECT_THROW(static_cast<void>(extrapolated_noise_scale(1, 1, 8, 2)), ConfigError);
}

}  // namespace
}  // namespace orthrus::studies
