// Spectral metrics keep their inequalities, on any type of matrix and from any sharding of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/studies/spectrum.hpp>
#include <orthrus/studies/theory.hpp>

#include "kernels/bf16.hpp"
#include "runtime/studies/dense.hpp"
#include "runtime/studies/random.hpp"

namespace orthrus::studies {
namespace {

Matrix gaussian(Index m, Index n, std::uint64_t seed) {
  Random random(seed);
  Matrix a(m, n);
  for (double& x : a.values) x = random.normal();
  return a;
}

TEST(Spectrum, IsOneForRankOneAndTheRankForOrthogonal) {
  const Spectrum one = spectrum_of(product(gaussian(7, 1, 2), gaussian(1, 9, 3)).view());
  for (const double x : {one.stable_rank, one.participation, one.erank1, one.erank2,
                         one.nuclear_rank, static_cast<double>(one.rank)}) {
    EXPECT_NEAR(x, 1, 1e-12);
  }
  const Spectrum flat = spectrum_of(polar(gaussian(6, 11, 4)).view());
  for (const double x : {flat.stable_rank, flat.participation, flat.erank1, flat.erank2,
                         flat.nuclear_rank, static_cast<double>(flat.rank)}) {
    EXPECT_NEAR(x, 6, 1e-11);
  }
  EXPECT_NEAR(flat.cond_eff, 1, 1e-12);
  EXPECT_NEAR(flat.frobenius_norm, std::sqrt(6.0), 1e-12);
  EXPECT_NEAR(flat.nuclear_norm, 6, 1e-12);
  const Spectrum none = spectrum_of(Matrix(3, 4).view());
  EXPECT_EQ(none.rank, 0);
  EXPECT_EQ(none.nuclear_rank, 0);
}

TEST(Spectrum, FollowsItsFormulas) {
  // σ = 4, 2, 1, 1: Σ = 8, Σ² = 22, Σ⁴ = 274.
  const Spectrum s = spectrum_of(std::vector<double>{1, 4, 1, 2});
  EXPECT_DOUBLE_EQ(s.stable_rank, 22.0 / 16);
  EXPECT_DOUBLE_EQ(s.nuclear_rank, 64.0 / 22);
  EXPECT_DOUBLE_EQ(s.participation, 22.0 * 22 / 274);
  const double h1 = 0.5 * std::log(2.0) + 0.25 * std::log(4.0) + 0.25 * std::log(8.0);
  EXPECT_NEAR(s.erank1, std::exp(h1), 1e-12);
  const double h2 =
      16.0 / 22 * std::log(22.0 / 16) + 4.0 / 22 * std::log(22.0 / 4) + 2.0 / 22 * std::log(22.0);
  EXPECT_NEAR(s.erank2, std::exp(h2), 1e-12);
  EXPECT_DOUBLE_EQ(s.cond_eff, 4);  // k = ⌈0.9·4⌉ = 4
  std::vector<double> ten;
  for (int k = 1; k <= 10; ++k) ten.push_back(k);
  EXPECT_DOUBLE_EQ(spectrum_of(ten).cond_eff, 10.0 / 2);  // the ninth largest
  // No over- or underflow of squares.
  const Spectrum tiny = spectrum_of(std::vector<double>{4e-200, 2e-200, 1e-200, 1e-200});
  EXPECT_NEAR(tiny.participation, s.participation, 1e-12);
  EXPECT_NEAR(tiny.nuclear_norm / 8e-200, 1, 1e-12);
}

TEST(Spectrum, ReadsEveryTypeAndLeadingDimension) {
  const Matrix a = gaussian(5, 8, 5);
  const std::vector<double> exact = singular_values(a.view());
  std::vector<float> f(5 * 11, 1e30F);
  std::vector<BFloat16> b(5 * 11, kernels::to_bf16(1e30F));
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 8; ++j) {
      f[static_cast<std::size_t>(i * 11 + j)] = static_cast<float>(a(i, j));
      b[static_cast<std::size_t>(i * 11 + j)] = kernels::to_bf16(a(i, j));
    }
  }
  const std::vector<double> in_f32 = singular_values({f.data(), 5, 8, 11, DType::f32});
  const std::vector<double> in_bf16 = singular_values({b.data(), 5, 8, 11, DType::bf16});
  for (std::size_t k = 0; k < exact.size(); ++k) {
    // Weyl: no further off than ‖rounding‖ ≤ u·‖A‖_F.
    EXPECT_NEAR(in_f32[k], exact[k], 0x1p-24 * frobenius(a));
    EXPECT_NEAR(in_bf16[k], exact[k], 0x1p-8 * frobenius(a));
  }
}

TEST(Spectrum, OfAGramTakesRoundingBelowZeroAsZero) {
  EXPECT_EQ(spectrum_of_gram(std::vector<double>{-1e-17, 1}).rank, 1);
}

TEST(PolarSensitivity, OfEqualValuesIsClosed) {
  // µ = 1: 4·(m(m−1)/2)/4 + (n−m)·m, for either orientation.
  const std::vector<double> ones(5, 1.0);
  EXPECT_DOUBLE_EQ(polar_sensitivity(ones, 5, 5), 10);
  EXPECT_DOUBLE_EQ(polar_sensitivity(ones, 5, 8), 25);
  EXPECT_DOUBLE_EQ(polar_sensitivity(ones, 8, 5), 25);
  const std::vector<double> singular{1, 0};
  EXPECT_TRUE(std::isinf(polar_sensitivity(singular, 2, 3)));
  EXPECT_DOUBLE_EQ(polar_sensitivity(singular, 2, 2), 4);  // (1 + 0)²: square ones stay finite
  // τ = 0.1, n = 3: τ²n = 0.03.
  EXPECT_NEAR(polar_sensitivity(singular, 2, 3, 0.1), 4 / 1.03 + 1 / 1.03 + 1 / 0.03, 1e-12);
}

TEST(PolarBatch, IsWhereNoiseAndSignalAreEqual) {
  const std::vector<double> mu{3, 2, 1};
  const PolarBatch at = polar_batch(mu, 3, 6, 0.01, 0.9, 64);
  EXPECT_FALSE(at.saturated);
  EXPECT_NEAR(at.batch, momentum_variance(0.9) * 0.01 * polar_sensitivity(mu, 3, 6) / 3, 1e-15);
  EXPECT_NEAR(at.noise_ratio, at.batch / 64, 1e-15);
  EXPECT_NEAR(polar_batch(mu, 3, 6, 0.01, 0.9, 128).noise_ratio, at.noise_ratio / 2, 1e-15);
  const PolarBatch noisy = polar_batch(std::vector<double>{3, 2, 1e-9}, 3, 6, 1, 0.9, 64);
  EXPECT_TRUE(noisy.saturated);
  // τ² = v(β)·s²/b, and the regularized S.
  const double tau = std::sqrt(momentum_variance(0.9) / 64);
  EXPECT_NEAR(
      noisy.batch,
      momentum_variance(0.9) * polar_sensitivity(std::vector<double>{3, 2, 1e-9}, 3, 6, tau) / 3,
      1e-12 * noisy.batch);
  EXPECT_EQ(polar_batch(mu, 3, 6, 0, 0.9, 64).batch, 0);
}

TEST(Flattening, IsTheDerivativeOfSingularValuesAndEntropy) {
  const Matrix w = gaussian(5, 7, 7), update = gaussian(5, 7, 8);
  const Flattening f = flattening(w.view(), update.view());
  const auto at = [&](double t) {
    Matrix moved = w;
    add(moved, t, update);
    return singular_values(moved);
  };
  constexpr double t = 1e-6;
  const std::vector<double> forth = at(t), back = at(-t);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_NEAR(f.dsigma[i], (forth[i] - back[i]) / (2 * t), 1e-7);
  }
  const auto entropy = [](const std::vector<double>& s) { return std::log(spectrum_of(s).erank1); };
  EXPECT_NEAR(f.rate, (entropy(forth) - entropy(back)) / (2 * t), 1e-7);
}

TEST(PowerIteration, FindsTheOperatorNormAndKeepsItsStart) {
  for (const auto& [m, n] : {std::pair<Index, Index>{30, 50}, {50, 30}}) {
    Matrix a = gaussian(m, n, 9);
    add(a, 5, product(gaussian(m, 1, 10), gaussian(1, n, 11)));
    const double exact = singular_values(a)[0];
    PowerIteration power;
    power.tolerance = 1e-10;
    power.iterations = 50;
    EXPECT_NEAR(power.operator_norm(a.view()) / exact, 1, 1e-8);
    power.iterations = 2;
    EXPECT_NEAR(power.operator_norm(a.view()) / exact, 1, 1e-8);  // from where it stopped
    PowerIteration fresh;
    fresh.iterations = 1;
    EXPECT_LT(fresh.operator_norm(a.view()), 0.99 * exact);
  }
  PowerIteration power;
  EXPECT_EQ(power.operator_norm(Matrix(3, 4).view()), 0);
}

TEST(DirectionQuality, IsZeroErrorAndFullAlignmentForThePolarFactor) {
  const Matrix g = gaussian(6, 9, 12), o = polar(g);
  EXPECT_LT(orthogonality_error(o.view()), 1e-13);
  EXPECT_NEAR(alignment(g.view(), o.view()), 1, 1e-12);
  Matrix twice = o;
  add(twice, 1, o);
  EXPECT_NEAR(orthogonality_error(twice.view()), 3, 1e-12);  // OOᵀ = 4I
  EXPECT_NEAR(orthogonality_error(transposed(twice).view()), 3, 1e-12);
  const Matrix other = polar(gaussian(6, 9, 13));
  EXPECT_LT(alignment(g.view(), other.view()), 0.9);
}

TEST(GeometryAdvisor, ChangesItsMindOnlyAfterFiveProbesBeyondTheBand) {
  using Advice = GeometryAdvisor::Advice;
  GeometryAdvisor advisor;
  for (int k = 0; k < 4; ++k) EXPECT_EQ(advisor.probe(10, 5), Advice::keep);
  EXPECT_EQ(advisor.probe(10, 5), Advice::spectral);
  EXPECT_NEAR(advisor.average_ratio(), 2, 1e-12);
  // Inside the band nothing changes, however long.
  for (int k = 0; k < 60; ++k) EXPECT_EQ(advisor.probe(5.5, 5), Advice::spectral);
  int probes = 0;
  while (advisor.probe(2, 5) == Advice::spectral) ++probes;
  EXPECT_EQ(advisor.advice(), Advice::euclidean);
  EXPECT_GE(probes, 4);
  EXPECT_LE(probes, 12);
  EXPECT_THROW((void)advisor.probe(0, 5), NumericError);
}

TEST(Spectra, RefuseWhatHasNone) {
  const std::vector<double> bad{1, 2, std::nan(""), 4};
  EXPECT_THROW((void)singular_values(matrix_view(bad.data(), Index{2}, Index{2})), NumericError);
  EXPECT_THROW((void)spectrum_of(std::vector<double>{1, -1}), NumericError);
  EXPECT_THROW((void)singular_values(ConstMatrixView{}), ShapeError);
  EXPECT_THROW((void)polar_sensitivity(std::vector<double>{1, 2}, 3, 4), ShapeError);
  EXPECT_THROW((void)flattening(gaussian(2, 3, 1).view(), gaussian(3, 2, 1).view()), ShapeError);
}

TEST(UpdateNoise, OfSmallNoiseIsTheDerivedRatioOfAHalf) {
  // M + E_a and M + E_b with entries of deviation τ: E‖polar_a − polar_b‖² = 2·τ²·S(µ).
  Random random(8);
  constexpr Index m = 6, n = 9;
  constexpr double tau = 1e-3;
  Matrix mean(m, n);
  for (double& x : mean.values) x = random.normal();
  const double s = polar_sensitivity(singular_values(mean), m, n);
  double sum = 0;
  constexpr int draws = 400;
  for (int k = 0; k < draws; ++k) {
    Matrix a = mean, b = mean;
    for (double& x : a.values) x += tau * random.normal();
    for (double& x : b.values) x += tau * random.normal();
    sum += update_noise(a.view(), b.view());
  }
  // Each of 400 is a sum of some ten squares: √(2/4000) is 2 %.
  EXPECT_NEAR(sum / draws, tau * tau * s / m, 0.08 * tau * tau * s / m);
  Matrix opposite = mean;
  for (double& x : opposite.values) x = -x;
  EXPECT_NEAR(update_noise(mean.view(), opposite.view()), 2, 1e-12);
  EXPECT_NEAR(update_noise(mean.view(), mean.view()), 0, 1e-15);
}

}  // namespace
}  // namespace orthrus::studies
