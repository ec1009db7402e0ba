#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <orthrus/error.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/eigh.hpp"
#include "kernels/spd_root.hpp"
#include "support/count_new.hpp"
#include "support/work.hpp"
#include "support/zoo.hpp"

namespace orthrus::kernels {
namespace {

using testing::HasSubstr;
using zoo::Dense;
using zoo::Matrix;
using zoo::same_bits;
using zoo::Work;

constexpr double f32_only = std::numeric_limits<double>::infinity();

// ---- the judge ----------------------------------------------------------------------------------

/// V diag(λ) Vᵀ with known V: functions of it are exact but for f64.
struct Spd {
  Matrix v;
  std::vector<double> lambda;

  template <class F>
  [[nodiscard]] Matrix map(F f) const {
    return zoo::Factors{v, lambda, v}.map(f);
  }
  [[nodiscard]] Matrix power(double e) const {
    return map([=](double x) { return std::pow(x, e); });
  }
  [[nodiscard]] double frobenius() const { return zoo::Factors{v, lambda, v}.frobenius(); }
};

template <class F>
Spd spd_of(Index m, std::uint64_t seed, F f) {
  Spd p{zoo::orthonormal_columns(m, m, seed), std::vector<double>(static_cast<std::size_t>(m))};
  for (std::size_t i = 0; i < p.lambda.size(); ++i) p.lambda[i] = f(static_cast<double>(i));
  return p;
}

/// λ from 1 down to 1/cond in equal ratios.
Spd conditioned(Index m, double cond, std::uint64_t seed) {
  const double steps = std::max<double>(1, static_cast<double>(m - 1));
  return spd_of(m, seed, [=](double i) { return std::pow(cond, -i / steps); });
}

/// Exactly symmetric, rounded to T.
template <class T>
Dense<T> rounded(const Matrix& x) {
  Dense<T> y = zoo::cast<T>(x);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < i; ++j) y(j, i) = y(i, j);
  }
  return y;
}

/// The eigenvectors of p + δI, by Jacobi's method in f64: p need not have been built from any.
template <class T>
Spd judged(const Dense<T>& p, double damping) {
  Matrix d = zoo::cast<double>(p);
  for (Index i = 0; i < d.rows; ++i) d(i, i) += damping;
  zoo::Factors f = zoo::svd(d);
  return {std::move(f.u), std::move(f.sigma)};
}

// ---- what is judged -----------------------------------------------------------------------------

RootOptions with(int r, double of_norm = 1e-5) {
  RootOptions options;
  options.r = r;
  options.damping = {0, 0, of_norm};
  return options;
}

/// For f64: to its own accuracy.
RootOptions with_f64(int r, double of_norm = 1e-5) {
  RootOptions options = with(r, of_norm);
  options.tolerance = 1e-12;
  options.least = 1e-12;
  options.accepted_residual = 1e-6;
  return options;
}

template <class T>
struct Roots {
  Dense<T> inverse, root;
  RootReport report;
};

template <class T>
Roots<T> roots_of(const Dense<T>& p, int s, const RootOptions& options,
                  const char* device = "cpu") {
  Roots<T> result{Dense<T>(p.rows, p.rows), Dense<T>(p.rows, p.rows), {}};
  const auto backend = open_backend(device);
  const std::size_t bytes = spd_root_workspace_bytes(p.rows, dtype_of<T>, options);
  EXPECT_EQ(bytes % 256, 0U);
  Work work(bytes);
  result.report = spd_root(p.view(), s, options, result.inverse.view(), result.root.view(),
                           work.span(), *backend);
  EXPECT_TRUE(work.end_untouched());
  return result;
}

template <class T>
RootReport multiply(const Dense<T>& p, int s, const RootOptions& options, Side side, Dense<T>& g,
                    const char* device = "cpu") {
  const auto backend = open_backend(device);
  Work work(multiply_spd_root_workspace_bytes(g.rows, g.cols, side, dtype_of<T>, options));
  const RootReport report =
      multiply_spd_root(p.view(), s, options, side, g.view(), work.span(), *backend);
  EXPECT_TRUE(work.end_untouched());
  return report;
}

// ---- tables -------------------------------------------------------------------------------------

double power(double x, int n) { return std::pow(x, n); }

/// p(x) of step w.
double image(const RootStep& w, int r, double x) { return x * w(power(x, r)); }

/// The best a·x + b·x^(r+1) + c·x^(2r+1) near 1 on [l, u], by Remez's exchange: an oracle apart
/// from the arithmetic, in 50 digits, that the tables come from.
RootStep optimal_step(int r, double l, double u) {
  using Real = long double;
  Real q = l + (u - l) / Real{4};
  Real s = l + 3 * (u - l) / Real{4};
  std::array<Real, 4> z{};
  for (int round = 0; round < 100; ++round) {
    std::array<std::array<Real, 5>, 4> rows{};
    const std::array<Real, 4> points{l, q, s, u};
    for (std::size_t i = 0; i < 4; ++i) {
      const Real x = points[i];
      rows[i] = {x, std::pow(x, Real(r + 1)), std::pow(x, Real(2 * r + 1)),
                 i % 2 == 0 ? 1.0L : -1.0L, 1.0L};
    }
    for (std::size_t k = 0; k < 4; ++k) {
      std::size_t pivot = k;
      for (std::size_t i = k; i < 4; ++i) {
        if (std::abs(rows[i][k]) > std::abs(rows[pivot][k])) pivot = i;
      }
      std::swap(rows[k], rows[pivot]);
      for (std::size_t i = 0; i < 4; ++i) {
        if (i == k) continue;
        const Real f = rows[i][k] / rows[k][k];
        for (std::size_t j = k; j < 5; ++j) rows[i][j] -= f * rows[k][j];
      }
    }
    for (std::size_t k = 0; k < 4; ++k) z[k] = rows[k][4] / rows[k][k];
    const Real n1 = r + 1;
    const Real n2 = 2 * r + 1;
    const Real root = std::sqrt(n1 * n1 * z[1] * z[1] - 4 * n2 * z[0] * z[2]);
    q = std::pow((-n1 * z[1] - root) / (2 * n2 * z[2]), 1 / Real(r));
    s = std::pow((-n1 * z[1] + root) / (2 * n2 * z[2]), 1 / Real(r));
  }
  return {static_cast<double>(z[0]), static_cast<double>(z[1]), static_cast<double>(z[2])};
}

// Each row is the optimal step for what the rows before have left, cushioned and recentred.
TEST(RootTables, AreThoseOfTheirRule) {
  int tables = 0;
  for (const RootTable& table : root_tables()) {
    ++tables;
    const int r = table.r;
    double l = std::pow(table.least, 1.0 / r);
    double u = 1;
    for (std::size_t k = 0; k + 1 < table.steps.size(); ++k) {
      ASSERT_GT(1 - l, 1e-4) << "a row too many";
      const RootStep p = optimal_step(r, std::max(l, 0.1 * u), u);
      const double z = 2 / (image(p, r, l) + image(p, r, u));
      const RootStep& row = table.steps[k];
      // On an interval of half width e the four equations are nearly one: of the 64 bits of long
      // double, e³ is lost, and the published rows come from double.
      const double e = (u - std::max(l, 0.1 * u)) / 2;
      const double digits = std::max(1e-13, 1e-17 / (e * e * e));
      EXPECT_NEAR(row.a, z * p.a, digits * std::abs(row.a)) << r << " " << table.least << " " << k;
      EXPECT_NEAR(row.b, z * p.b, digits * std::abs(row.b)) << r << " " << table.least << " " << k;
      EXPECT_NEAR(row.c, z * p.c, digits * std::abs(row.c)) << r << " " << table.least << " " << k;
      l = image(row, r, l);
      u = 2 - l;
    }
    // The published table of r = 1 ends at 1.3e-4, where its rule asks for one row more.
    EXPECT_LE(1 - l, r == 1 && table.least == 1e-4 ? 1.4e-4 : 1e-4) << "a row too few";
    const double limit = 1 / (1 - 2.0 / (r + 1) + 1.0 / (2 * r + 1));
    EXPECT_NEAR(table.steps.back().a, limit, 1e-15);
    EXPECT_NEAR(table.steps.back().b, -2 * limit / (r + 1), 1e-15);
    EXPECT_NEAR(table.steps.back().c, limit / (2 * r + 1), 1e-15);
  }
  EXPECT_EQ(tables, 12);
}

/// max |x − 1| after `steps` steps over λ in [least, 1].
double worst(const RootTable& table, int steps, double least, double safety = 1,
             int points = 20000) {
  double most = 0;
  for (int i = 0; i <= points; ++i) {
    double x = std::pow(least, (1 - static_cast<double>(i) / points) / table.r);
    for (int k = 0; k < steps; ++k) x = image(table.step(k, safety), table.r, x);
    most = std::max(most, std::abs(x - 1));
  }
  return most;
}

struct Published {
  int r;
  double least;
  int steps;
  double error, digit;  ///< as printed, and half a unit of its last digit
};

// Of the tables for 1e-4, also far below what they are made for.
TEST(RootTables, HaveThePublishedErrors) {
  const std::vector<Published> printed = {{1, 1e-4, 6, 1.3e-4, 5e-6},
                                          {2, 1e-4, 3, .32, 5e-3},
                                          {2, 1e-4, 4, 2.1e-2, 5e-4},
                                          {2, 1e-4, 5, 5.8e-6, 5e-8},
                                          {4, 1e-4, 3, 4.9e-2, 5e-4},
                                          {4, 1e-4, 4, 2.3e-4, 5e-6},
                                          {4, 1e-4, 5, 2e-11, 5e-12},
                                          {2, 1e-6, 9, 5e-5, 5e-6},
                                          {4, 1e-6, 8, 6e-5, 5e-6},
                                          // "6e-13" in print, which is for a seventh row that is
                                          // not: with the limit in its place 1 − x = (1.34e-4)³.
                                          {1, 1e-4, 7, 2.4e-12, 5e-14}};
  for (const Published& p : printed) {
    const auto tables = root_tables();
    const auto table = std::find_if(tables.begin(), tables.end(), [&](const RootTable& t) {
      return t.r == p.r && t.least == 1e-4;
    });
    ASSERT_NE(table, tables.end());
    EXPECT_NEAR(worst(*table, p.steps, p.least), p.error, p.digit) << p.r << " " << p.steps;
  }
}

TEST(RootPlans, KeepTheirToleranceInNoMoreStepsThanAnyTable) {
  for (const int r : {1, 2, 4}) {
    for (const double least : {1e-1, 1e-3, 1e-4, 3e-5, 1e-5, 1e-6, 1e-7, 6e-8, 1e-10}) {
      for (const double tolerance : {1e-2, 1e-5, 1e-7}) {
        for (const double safety : {1.0, 1.001}) {
          const RootPlan plan = plan_root(r, least, tolerance, safety, 60);
          EXPECT_LE(plan.error, tolerance);
          // Safety moves what the upper end of the interval becomes by a few (safety − 1)³.
          EXPECT_LE(worst(*plan.table, plan.steps, least, safety, 1000), plan.error + 2e-8);
          for (const RootTable& table : root_tables()) {
            if (table.r != r || plan.steps == 1) continue;
            EXPECT_GE(worst(table, plan.steps - 1, std::min(least, table.least), safety, 1000),
                      tolerance - 2e-8)
                << r << " " << least << " has a shorter plan";
          }
        }
      }
    }
  }
}

TEST(RootPlans, EndWhereTheyAreToldTo) {
  const RootPlan plan = plan_root(2, 1e-7, 1e-5, 1.001, 4);
  EXPECT_EQ(plan.steps, 4);
  EXPECT_NEAR(plan.error, worst(*plan.table, 4, 1e-7, 1.001), 1e-6);
  EXPECT_THROW(plan_root(3, 1e-4, 1e-5, 1, 9), ConfigError);
  EXPECT_THROW(plan_root(2, 0, 1e-5, 1, 9), ConfigError);
  EXPECT_THROW(plan_root(2, 2, 1e-5, 1, 9), ConfigError);
  EXPECT_THROW(plan_root(2, std::nan(""), 1e-5, 1, 9), ConfigError);
  EXPECT_THROW(plan_root(2, 1e-4, 0, 1, 9), ConfigError);
  EXPECT_THROW(plan_root(2, 1e-4, 1e-5, 0.9, 9), ConfigError);
  EXPECT_THROW(plan_root(2, 1e-4, 1e-5, 1, 0), ConfigError);
}

// ---- against eigenvectors -----------------------------------------------------------------------

struct SpectrumCase {
  const char* name;
  Index m;
  double of_norm;
};

class SpdRootOnSpectra : public testing::TestWithParam<std::tuple<SpectrumCase, const char*>> {
 protected:
  static Dense<float> matrix() {
    const auto [name, m, of_norm] = std::get<0>(GetParam());
    const std::string which = name;
    if (which == "flat") return rounded<float>(conditioned(m, 1, 5).power(1));
    if (which == "gaussian") {
      const Matrix x = zoo::gaussian(m, 2 * m, 5);
      return rounded<float>(zoo::product(x, zoo::transposed(x)));
    }
    if (which == "square_gaussian") {
      const Matrix x = zoo::gaussian(m, m, 5);
      return rounded<float>(zoo::product(x, zoo::transposed(x)));
    }
    if (which == "clustered") {
      return rounded<float>(
          spd_of(m, 5, [](double i) { return i < 4 ? 1 : 1e-3 * (1 + 1e-6 * i); }).power(1));
    }
    if (which == "rank_deficient") {
      return rounded<float>(spd_of(m, 5, [m = m](double i) {
                              return i < static_cast<double>(m) / 3 ? 1 : 0;
                            }).power(1));
    }
    if (which == "rank_one") {
      return rounded<float>(spd_of(m, 5, [](double i) { return i < 1 ? 1 : 0; }).power(1));
    }
    return rounded<float>(conditioned(m, std::stod(which.substr(5)), 5).power(1));
  }
};

// Judged on the damped matrix of the report, whose δ is judged apart. D is known to u = 2^-24 of
// its norm ν; where its eigenvalue is ν·l, an error of that size moves the inverse root by u/(r·l).
// The first steps, in f64, keep to that; the others lift their own rounding by at most 256, which
// gives 256u/r = 1.5e-5/r. A few such units by sums of m products: 5e-5. The positive root
// multiplies K, whose rounding is u·l^(−1/r), by K once more for r = 4: u·l^(−1/2), and what is
// lifted.
TEST_P(SpdRootOnSpectra, AgreesWithEigenvectors) {
  const auto& [which, device] = GetParam();
  const Dense<float> p = matrix();
  const double norm = zoo::frobenius(p);
  for (const int r : {1, 2, 4}) {
    for (int s = 1; s <= r; ++s) {
      const Roots<float> result = roots_of(p, s, with(r, which.of_norm), device);
      ASSERT_TRUE(result.report.ok()) << result.report.problem();
      EXPECT_NEAR(result.report.damping, which.of_norm * norm, 1e-6 * which.of_norm * norm);
      EXPECT_NEAR(result.report.norm, norm, 1e-6 * norm);
      EXPECT_LE(result.report.planned, 1e-5);
      EXPECT_LE(result.report.residual, 1e-2);
      EXPECT_GT(result.report.steps_f64, 0);
      EXPECT_LT(result.report.steps_f64, result.report.steps);
      const Spd judge = judged(p, result.report.damping);
      const double e = static_cast<double>(s) / r;
      const double lifted = std::sqrt(256 / result.report.least) * 0x1p-24;
      EXPECT_LE(zoo::relative_error(result.inverse, judge.power(-e)), s * 5e-5) << r << " " << s;
      EXPECT_LE(zoo::relative_error(result.root, judge.power(e)), 1e-5 + lifted) << r << " " << s;
      // What it reports is no less than what it is; the output is rounded once more.
      if (s == 1) {
        EXPECT_LE(zoo::relative_error(result.inverse, judge.power(-e)),
                  result.report.residual + 1e-7);
      }
      EXPECT_TRUE(same_bits(result.inverse, zoo::transposed(result.inverse)));
      EXPECT_TRUE(same_bits(result.root, zoo::transposed(result.root)));
    }
  }
}

// f32 throughout: rounding is lifted by all steps, to u·ν/λ_min; the r − 1 products of the positive
// root add theirs.
TEST_P(SpdRootOnSpectra, AgreesWithEigenvectorsInF32) {
  const auto& [which, device] = GetParam();
  const Dense<float> p = matrix();
  for (const int r : {1, 2, 4}) {
    RootOptions options = with(r, which.of_norm);
    options.lifted = f32_only;
    const Roots<float> result = roots_of(p, 1, options, device);
    ASSERT_TRUE(result.report.ok()) << result.report.problem();
    EXPECT_EQ(result.report.steps_f64, 0);
    const Spd judge = judged(p, result.report.damping);
    const double unit = 0x1p-24 / result.report.least;  // 6e-3 for 1e-5, 6e-2 for 1e-6
    EXPECT_LE(zoo::relative_error(result.inverse, judge.power(-1.0 / r)), unit / 4) << r;
    EXPECT_LE(zoo::relative_error(result.root, judge.power(1.0 / r)), 3 * r * unit) << r;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Section4, SpdRootOnSpectra,
    testing::Combine(
        testing::Values(SpectrumCase{"flat", 64, 1e-5}, SpectrumCase{"gaussian", 64, 1e-5},
                        SpectrumCase{"square_gaussian", 129, 1e-5},
                        SpectrumCase{"cond_1e2", 64, 1e-5}, SpectrumCase{"cond_1e4", 64, 1e-5},
                        SpectrumCase{"cond_1e6", 64, 1e-5}, SpectrumCase{"cond_1e8", 64, 1e-5},
                        SpectrumCase{"cond_1e8", 64, 1e-6}, SpectrumCase{"cond_1e4", 129, 1e-5},
                        SpectrumCase{"cond_1e4", 17, 1e-5}, SpectrumCase{"clustered", 64, 1e-5},
                        SpectrumCase{"rank_deficient", 64, 1e-5},
                        SpectrumCase{"rank_one", 64, 1e-5}, SpectrumCase{"cond_1e2", 3, 1e-5},
                        SpectrumCase{"cond_1e4", 2, 1e-5}, SpectrumCase{"flat", 1, 1e-5}),
        testing::Values("cpu", "reference")),
    [](const auto& info) {
      const SpectrumCase& c = std::get<0>(info.param);
      return std::string(c.name) + "_" + std::to_string(c.m) +
             (c.of_norm == 1e-6 ? "_damped_less_" : "_") + std::get<1>(info.param);
    });

// ---- the specification's own tests, in f64 ------------------------------------------------------

class SpdRootF64 : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Devices, SpdRootF64, testing::Values("cpu", "reference"));

TEST_P(SpdRootF64, HasTheSpecifiedErrors) {  // T4.1, T4.2
  const Spd exact = conditioned(64, 1e3, 3);
  const Matrix p = rounded<double>(exact.power(1));
  const double published[] = {0, 2e-2, 8e-3, 0, 4e-3};
  for (const int r : {1, 2, 4}) {
    const Roots<double> result = roots_of(p, 1, with_f64(r), GetParam());
    ASSERT_TRUE(result.report.ok()) << result.report.problem();
    EXPECT_EQ(result.report.steps_f64, result.report.steps);
    const double damping = 1e-5 * exact.frobenius();
    EXPECT_NEAR(result.report.damping, damping, 1e-12);
    const auto damped = [&](double e) {
      return exact.map([=](double x) { return std::pow(x + damping, e); });
    };
    // u·256/λ_min of f64, and the plan's 1e-12.
    EXPECT_LE(zoo::relative_error(result.inverse, damped(-1.0 / r)), 1e-11) << r;
    EXPECT_LE(zoo::relative_error(result.root, damped(1.0 / r)), 1e-11) << r;
    // What is damped away: δ is 3e-5 of the norm, 3e-2 of the least eigenvalue.
    const double off = zoo::relative_error(result.inverse, exact.power(-1.0 / r));
    EXPECT_LE(off, published[r]) << r;
    EXPECT_GE(off, published[r] / 10) << r;
    if (r > 1) {
      EXPECT_LE(zoo::max_difference(result.root, exact.power(1.0 / r)), 2e-3);
    }
  }
}

// A defect of a published script: with s = 1 it had P^(3/4) for P^(1/4).
TEST_P(SpdRootF64, OfAFourthIsReachedWithThreeAndNotWithOne) {  // T4.2, D2
  const Spd exact = conditioned(64, 1e3, 4);
  const Matrix p = rounded<double>(exact.power(1));
  const RootOptions options = with_f64(4, 1e-12);
  const Roots<double> result = roots_of(p, 1, options, GetParam());
  EXPECT_LE(zoo::relative_error(result.root, exact.power(0.25)), 1e-8);
  for (const Side side : {Side::left, Side::right}) {
    for (const auto& [s, e] : {std::pair{3, 0.25}, {2, 0.5}, {1, 0.75}}) {
      Matrix g = p;
      ASSERT_TRUE(multiply(p, s, options, side, g, GetParam()).ok());
      EXPECT_LE(zoo::relative_error(g, exact.power(e)), 1e-8) << s;
      EXPECT_GE(zoo::relative_error(g, exact.power(e == 0.25 ? 0.75 : 0.25)), 0.1) << s;
    }
  }
  for (const auto& [s, e] : {std::pair{1, 0.25}, {2, 0.5}, {3, 0.75}, {4, 1.0}}) {
    const Roots<double> other = roots_of(p, s, options, GetParam());
    EXPECT_LE(zoo::relative_error(other.root, exact.power(e)), 1e-8) << s;
    EXPECT_LE(zoo::relative_error(other.inverse, exact.power(-e)), 1e-8) << s;
  }
}

TEST_P(SpdRootF64, ToItsPowerIsTheMatrixAndCommutesWithIt) {  // T4.3
  const Matrix p = rounded<double>(conditioned(33, 1e3, 5).power(1));
  for (const int r : {1, 2, 4}) {
    const Roots<double> result = roots_of(p, 1, with_f64(r, 1e-12), GetParam());
    ASSERT_TRUE(result.report.ok());
    Matrix product = result.root;
    Matrix identity = result.inverse;
    for (int i = 1; i < r; ++i) {
      product = zoo::product(product, result.root);
      identity = zoo::product(identity, result.inverse);
    }
    identity = zoo::product(identity, p);
    EXPECT_LE(zoo::relative_error(product, p), 1e-9);
    for (Index i = 0; i < p.rows; ++i) identity(i, i) -= 1;
    EXPECT_LE(zoo::frobenius(identity), 1e-8);
    EXPECT_LE(zoo::relative_error(zoo::product(result.root, p), zoo::product(p, result.root)),
              1e-10);
  }
}

TEST_P(SpdRootF64, OfAMultipleOfOneIsThatOfANumber) {  // T4.3
  for (const Index m : {1, 2, 17}) {
    for (const double c : {1.0, 3.0, 1e-20, 1e20}) {
      Matrix p(m, m);
      for (Index i = 0; i < m; ++i) p(i, i) = c;
      for (const int r : {1, 2, 4}) {
        const Roots<double> result = roots_of(p, 1, with_f64(r, 0), GetParam());
        ASSERT_TRUE(result.report.ok()) << result.report.problem();
        for (Index i = 0; i < m; ++i) {
          for (Index j = 0; j < m; ++j) {
            const double one = i == j ? 1 : 0;
            EXPECT_NEAR(result.inverse(i, j) * std::pow(c, 1.0 / r), one, 1e-11);
            EXPECT_NEAR(result.root(i, j) * std::pow(c, -1.0 / r), one, 1e-11);
          }
        }
      }
    }
  }
}

TEST_P(SpdRootF64, TimesAMatrixIsTheRootTimesIt) {  // T4.5
  constexpr Index m = 33;
  const Matrix p = rounded<double>(conditioned(m, 1e3, 6).power(1));
  for (const int r : {1, 2, 4}) {
    for (int s = 1; s <= r; ++s) {
      const RootOptions options = with_f64(r);
      const Matrix inverse = roots_of(p, s, options, GetParam()).inverse;
      for (const Index n : {1, 5, 40}) {
        Matrix left = zoo::gaussian(m, n, 7);
        Matrix right = zoo::transposed(left);
        const Matrix expected = zoo::product(inverse, left);
        ASSERT_TRUE(multiply(p, s, options, Side::left, left, GetParam()).ok());
        ASSERT_TRUE(multiply(p, s, options, Side::right, right, GetParam()).ok());
        EXPECT_LE(zoo::relative_error(left, expected), 1e-10) << r << " " << s;
        EXPECT_LE(zoo::relative_error(right, zoo::transposed(expected)), 1e-10) << r << " " << s;
      }
    }
  }
}

// ---- f32 ----------------------------------------------------------------------------------------

class SpdRootF32 : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Devices, SpdRootF32, testing::Values("cpu", "reference"));

TEST_P(SpdRootF32, HasThePublishedErrors) {  // T4.4
  const Spd exact = conditioned(64, 1e3, 3);
  const Dense<float> p = rounded<float>(exact.power(1));
  const double damping = 1e-5 * exact.frobenius();
  for (const double lifted : {256.0, f32_only}) {
    RootOptions square = with(2);
    square.lifted = lifted;
    const auto damped = [&](double e) {
      return exact.map([=](double x) { return std::pow(x + damping, e); });
    };
    EXPECT_LE(zoo::relative_error(roots_of(p, 1, square, GetParam()).root, damped(0.5)), 2e-4);
    RootOptions fourth = with(4);
    fourth.lifted = lifted;
    const Dense<float> g = zoo::cast<float>(zoo::gaussian(20, 64, 4));
    Dense<float> product = g;
    ASSERT_TRUE(multiply(p, 1, fourth, Side::right, product, GetParam()).ok());
    EXPECT_LE(zoo::relative_error(product, zoo::product(zoo::cast<double>(g), damped(-0.25))),
              1e-3);
  }
}

TEST_P(SpdRootF32, TimesAMatrixIsTheRootTimesIt) {
  constexpr Index m = 40;
  const Dense<float> p = rounded<float>(conditioned(m, 1e4, 6).power(1));
  for (const int r : {1, 2, 4}) {
    for (const int s : {1, r - 1, r, r + 2}) {
      if (s == 0) continue;
      const RootOptions options = with(r);
      Dense<float> left = zoo::cast<float>(zoo::gaussian(m, 9, 7));
      Dense<float> right = zoo::transposed(left);
      const Matrix before = zoo::cast<double>(left);
      const RootReport report = multiply(p, s, options, Side::left, left, GetParam());
      ASSERT_TRUE(report.ok()) << report.problem();
      ASSERT_TRUE(multiply(p, s, options, Side::right, right, GetParam()).ok());
      const Matrix expected =
          zoo::product(judged(p, report.damping).power(-static_cast<double>(s) / r), before);
      // As for the root, and W rounded to f32 in each step: a few 2^-24·a.
      EXPECT_LE(zoo::relative_error(left, expected), s * 1e-4) << r << " " << s;
      EXPECT_LE(zoo::relative_error(right, zoo::transposed(expected)), s * 1e-4) << r << " " << s;
    }
  }
}

// Of cP they are c^(∓s/r) as large: nothing depends on units but what is absolute.
TEST_P(SpdRootF32, AreCovariantFrom1em20To1e20) {
  const Spd exact = conditioned(31, 1e3, 8);
  for (const int r : {1, 2, 4}) {
    const Roots<float> expected = roots_of(rounded<float>(exact.power(1)), 1, with(r), GetParam());
    for (const double c : {1e-20, 1e-7, 1e7, 1e20}) {
      const Roots<float> scaled = roots_of(
          rounded<float>(exact.map([=](double x) { return c * x; })), 1, with(r), GetParam());
      ASSERT_TRUE(scaled.report.ok()) << scaled.report.problem();
      EXPECT_EQ(scaled.report.steps, expected.report.steps);
      // c·P is rounded anew, which at a condition of 1e3 is 6e-5 of λ_min.
      EXPECT_LE(
          zoo::relative_error(zoo::scaled(zoo::cast<double>(scaled.inverse), std::pow(c, 1.0 / r)),
                              expected.inverse),
          1e-4);
      EXPECT_LE(
          zoo::relative_error(zoo::scaled(zoo::cast<double>(scaled.root), std::pow(c, -1.0 / r)),
                              expected.root),
          1e-4);
    }
  }
}

TEST_P(SpdRootF32, IsDampedByEachOfItsTerms) {
  const Spd exact = conditioned(12, 1e2, 9);
  const Dense<float> p = rounded<float>(exact.power(1));
  double trace = 0;
  for (const double x : exact.lambda) trace += x;
  const auto damping_of = [&](const Damping& damping) {
    RootOptions options = with(2);
    options.damping = damping;
    const Roots<float> result = roots_of(p, 1, options, GetParam());
    EXPECT_TRUE(result.report.ok()) << result.report.problem();
    EXPECT_LE(zoo::relative_error(result.inverse, judged(p, result.report.damping).power(-0.5)),
              1e-4);
    return result.report.damping;
  };
  EXPECT_NEAR(damping_of({3, 0, 0}), 3, 1e-6);  // ten times the norm
  EXPECT_NEAR(damping_of({0, 1e-2, 0}), 1e-2 * trace / 12, 1e-7);
  EXPECT_NEAR(damping_of({0, 0, 1e-3}), 1e-3 * exact.frobenius(), 1e-7);
  EXPECT_NEAR(damping_of({1, 1, 1}), 1 + trace / 12 + exact.frobenius(), 1e-5);
  EXPECT_EQ(damping_of({0, 0, 0}), 0);
}

// Zero with something on its diagonal is a number.
TEST_P(SpdRootF32, OfDampedZeroIsANumber) {
  RootOptions options = with(4);
  options.damping = {16, 0, 0};
  const Roots<float> result = roots_of(Dense<float>(5, 5), 1, options, GetParam());
  ASSERT_TRUE(result.report.ok()) << result.report.problem();
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 5; ++j) {
      EXPECT_NEAR(result.inverse(i, j), i == j ? 0.5 : 0, 1e-6);
      EXPECT_NEAR(result.root(i, j), i == j ? 2 : 0, 1e-5);
    }
  }
}

// ---- failures -----------------------------------------------------------------------------------

struct Failure {
  const char* name;
  RootStatus status;
  const char* problem;
};

class SpdRootFails : public testing::TestWithParam<std::tuple<Failure, const char*>> {
 protected:
  static Dense<float> matrix() {
    const std::string which = std::get<0>(GetParam()).name;
    const Spd good = conditioned(19, 10, 2);
    Dense<float> p = rounded<float>(good.power(1));
    const auto with_least = [&](double x) {
      Spd bad = good;
      bad.lambda.back() = x;
      return rounded<float>(bad.power(1));
    };
    if (which == "nan") p(18, 3) = p(3, 18) = std::numeric_limits<float>::quiet_NaN();
    if (which == "inf") p(4, 4) = std::numeric_limits<float>::infinity();
    if (which == "zero") return {19, 19};
    if (which == "negative") return rounded<float>(good.map([](double x) { return -x; }));
    if (which == "indefinite") return with_least(-0.3);
    if (which == "barely_indefinite") return with_least(-1e-3);
    if (which == "singular") {
      for (Index i = 0; i < 19; ++i) p(7, i) = p(i, 7) = 0;
    }
    if (which == "tiny" || which == "huge") {
      for (float& x : p.data) x = std::ldexp(x, which == "tiny" ? -124 : 124);
    }
    return p;
  }
};

TEST_P(SpdRootFails, AndSaysSoAndWritesNothing) {
  const auto& [failure, device] = GetParam();
  const Dense<float> p = matrix();
  const auto backend = open_backend(device);
  for (const int r : {1, 2, 4}) {
    RootOptions options = with(r, 0);  // nothing on the diagonal
    Dense<float> inverse = zoo::cast<float>(zoo::gaussian(19, 19, 1));
    Dense<float> root = zoo::cast<float>(zoo::gaussian(19, 19, 2));
    Dense<float> g = zoo::cast<float>(zoo::gaussian(19, 6, 3));
    const auto before = std::tuple(inverse.data, root.data, g.data);
    Work work(std::max(spd_root_workspace_bytes(19, DType::f32, options),
                       multiply_spd_root_workspace_bytes(19, 6, Side::left, DType::f32, options)));
    const RootReport report =
        spd_root(p.view(), 1, options, inverse.view(), root.view(), work.span(), *backend);
    EXPECT_EQ(report.status, failure.status) << r;
    EXPECT_FALSE(report.ok());
    EXPECT_THAT(report.problem(), HasSubstr(failure.problem));
    const RootReport product =
        multiply_spd_root(p.view(), 1, options, Side::left, g.view(), work.span(), *backend);
    EXPECT_EQ(product.status, failure.status) << r;
    EXPECT_EQ(std::tuple(inverse.data, root.data, g.data), before);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, SpdRootFails,
    testing::Combine(
        testing::Values(
            Failure{"nan", RootStatus::not_finite, "not finite"},
            Failure{"inf", RootStatus::not_finite, "not finite"},
            Failure{"zero", RootStatus::not_positive, "trace is not positive"},
            Failure{"negative", RootStatus::not_positive, "trace is not positive"},
            Failure{"indefinite", RootStatus::not_converged, "an eigenvalue is negative"},
            Failure{"barely_indefinite", RootStatus::not_converged, "an eigenvalue is negative"},
            Failure{"singular", RootStatus::not_converged, "below"},
            Failure{"tiny", RootStatus::out_of_range, "scale it"},
            Failure{"huge", RootStatus::out_of_range, "scale it"}),
        testing::Values("cpu", "reference")),
    [](const auto& info) {
      return std::string(std::get<0>(info.param).name) + "_" + std::get<1>(info.param);
    });

// The coupled variable converges whatever K is: K is judged by itself. Of f32 alone this asks too
// much, and is told; the product, which has no K to judge, estimates it.
TEST(SpdRoot, ReportsWhatF32DoesNotReach) {
  const Dense<float> p = rounded<float>(conditioned(64, 1e8, 2).power(1));
  for (const int r : {2, 4}) {
    RootOptions options = with(r, 2e-7);
    const Roots<float> good = roots_of(p, 1, options);
    ASSERT_TRUE(good.report.ok()) << good.report.problem();
    const Spd judge = judged(p, good.report.damping);
    EXPECT_LE(zoo::relative_error(good.inverse, judge.power(-1.0 / r)), 5e-5);
    EXPECT_LE(zoo::relative_error(good.root, judge.power(1.0 / r)), 2e-3);
    options.lifted = f32_only;
    const RootReport bad = roots_of(p, 1, options).report;
    EXPECT_EQ(bad.status, RootStatus::not_converged) << bad.residual;
    EXPECT_THAT(bad.problem(), HasSubstr("too small for f32"));
    Dense<float> g = zoo::cast<float>(zoo::gaussian(64, 5, 1));
    EXPECT_EQ(multiply(p, 1, options, Side::left, g).status, RootStatus::not_converged);
  }
}

// Too few steps for what is asked: told, not returned.
TEST(SpdRoot, ReportsWhatItsStepsDoNotReach) {
  const Dense<float> p = rounded<float>(conditioned(20, 1e6, 2).power(1));
  RootOptions options = with(2, 1e-6);
  ASSERT_TRUE(roots_of(p, 1, options).report.ok());
  options.most_steps = 3;
  const RootReport cut = roots_of(p, 1, options).report;
  EXPECT_EQ(cut.status, RootStatus::not_converged);
  EXPECT_EQ(cut.steps, 3);
  EXPECT_GT(cut.planned, 0.5);
  EXPECT_GT(cut.residual, 0.5);
  options = with(2, 1e-6);
  options.least = 1e-3;  // which it has not
  const RootReport wrong = roots_of(p, 1, options).report;
  EXPECT_EQ(wrong.status, RootStatus::not_converged);
  EXPECT_LE(wrong.planned, 1e-5);
}

// A caller who knows more than the damping says spares steps.
TEST(SpdRoot, TakesFewerStepsWhereTheLeastEigenvalueIsKnown) {
  const Dense<float> p = rounded<float>(conditioned(20, 10, 2).power(1));
  RootOptions options = with(2, 1e-7);
  const Roots<float> safe = roots_of(p, 1, options);
  options.least = 0.02;  // 0.1 of √(Σ λ²), which is below 5
  const Roots<float> known = roots_of(p, 1, options);
  ASSERT_TRUE(known.report.ok());
  EXPECT_LT(known.report.steps, safe.report.steps);
  EXPECT_LE(zoo::relative_error(known.inverse, safe.inverse), 2e-5);  // both as planned
}

TEST(SpdRoot, RefusesShapesThatContradictEachOther) {
  const auto backend = open_backend("cpu");
  Dense<float> p = rounded<float>(conditioned(4, 10, 2).power(1));
  Dense<float> out(4, 4);
  Dense<float> wrong(5, 5);
  Matrix wide(4, 4);
  Dense<float> g(4, 3);
  const RootOptions options = with(2);
  Work work(1 << 20);
  const auto call = [&](ConstMatrixView from, int s, MatrixView inverse, MatrixView root,
                        std::span<std::byte> scratch) {
    return spd_root(from, s, options, inverse, root, scratch, *backend);
  };
  EXPECT_THROW(call(g.view(), 1, out.view(), {}, work.span()), ShapeError);
  EXPECT_THROW(call({}, 1, out.view(), {}, work.span()), ShapeError);
  EXPECT_THROW(call(p.view(), 1, wrong.view(), {}, work.span()), ShapeError);
  EXPECT_THROW(call(p.view(), 1, wide.view(), {}, work.span()), ShapeError);
  EXPECT_THROW(call(p.view(), 1, out.view(), out.view(), work.span()), ShapeError);
  EXPECT_THROW(call(p.view(), 1, out.view(), p.view(), work.span()), ShapeError);
  EXPECT_THROW(call(p.view(), 0, out.view(), {}, work.span()), ConfigError);
  EXPECT_THROW(call(p.view(), 3, out.view(), {}, work.span()), ConfigError);
  const std::size_t bytes = spd_root_workspace_bytes(4, DType::f32, options);
  EXPECT_THROW(call(p.view(), 1, out.view(), {}, work.span().first(bytes - 1)), ShapeError);
  RootOptions bad = options;
  bad.r = 3;
  EXPECT_THROW(spd_root(p.view(), 1, bad, out.view(), {}, work.span(), *backend), ConfigError);
  for (const double least : {0.0, 1.5, std::nan("")}) {
    bad = options;
    bad.least = least;
    EXPECT_THROW(spd_root(p.view(), 1, bad, out.view(), {}, work.span(), *backend), ConfigError);
  }
  bad = options;
  bad.damping.of_mean = -1;
  EXPECT_THROW(spd_root(p.view(), 1, bad, out.view(), {}, work.span(), *backend), ConfigError);
  const auto product = [&](Side side, int s, MatrixView x, std::span<std::byte> scratch) {
    return multiply_spd_root(p.view(), s, options, side, x, scratch, *backend);
  };
  EXPECT_THROW(product(Side::right, 1, g.view(), work.span()), ShapeError);
  EXPECT_THROW(product(Side::left, 1, wide.view(), work.span()), ShapeError);
  EXPECT_THROW(product(Side::left, 0, g.view(), work.span()), ConfigError);
  EXPECT_THROW(product(Side::left, 1, g.view(), work.span().first(256)), ShapeError);
}

// ---- bits and memory ----------------------------------------------------------------------------

TEST_P(SpdRootF32, HasTheSameBitsWhateverIsAround) {
  for (const Index m : {1, 2, 17, 150}) {
    for (const int r : {1, 2, 4}) {
      const Dense<float> p = rounded<float>(conditioned(m, 1e3, 3).power(1));
      const Roots<float> expected = roots_of(p, 1, with(r), GetParam());
      const auto backend = open_backend(GetParam());
      Work work(spd_root_workspace_bytes(m, DType::f32, with(r)));
      const Index ld = m + 3;
      const auto extent = static_cast<std::size_t>(m * ld);
      std::vector<float> from(extent, -7.0F);
      for (Index i = 0; i < m; ++i) {
        for (Index j = 0; j < m; ++j) from[static_cast<std::size_t>(i * ld + j)] = p(i, j);
      }
      std::vector<float> root(extent, -7.0F);
      const MatrixView gaps{from.data(), m, m, ld, DType::f32};
      const MatrixView root_gaps{root.data(), m, m, ld, DType::f32};
      for (int again = 0; again < 2; ++again) {  // the second in scratch that is not new
        std::vector<float> inverse(extent, -7.0F);
        const MatrixView inverse_gaps{inverse.data(), m, m, ld, DType::f32};
        ASSERT_TRUE(
            spd_root(gaps, 1, with(r), inverse_gaps, root_gaps, work.span(), *backend).ok());
        for (Index i = 0; i < m; ++i) {
          for (Index j = 0; j < ld; ++j) {
            const auto at = static_cast<std::size_t>(i * ld + j);
            EXPECT_EQ(inverse[at], j < m ? expected.inverse(i, j) : -7.0F);
            EXPECT_EQ(root[at], j < m ? expected.root(i, j) : -7.0F);
          }
        }
      }
      // In P's place, and alone.
      ASSERT_TRUE(spd_root(gaps, 1, with(r), gaps, {}, work.span(), *backend).ok());
      for (Index i = 0; i < m; ++i) {
        for (Index j = 0; j < m; ++j) {
          EXPECT_EQ(from[static_cast<std::size_t>(i * ld + j)], expected.inverse(i, j));
        }
      }
    }
  }
}

TEST(SpdRoot, AllocatesNothingAfterTheFirstCall) {
  const auto backend = open_backend("cpu");
  constexpr Index m = 70;
  const Dense<float> p = rounded<float>(conditioned(m, 1e3, 3).power(1));
  Dense<float> inverse(m, m);
  Dense<float> root(m, m);
  Dense<float> g = zoo::cast<float>(zoo::gaussian(m, 30, 1));
  Work work(spd_root_workspace_bytes(m, DType::f32, with(4)));
  Work more(multiply_spd_root_workspace_bytes(m, 30, Side::left, DType::f32, with(4)));
  const std::span<std::byte> first = work.span();
  const std::span<std::byte> second = more.span();
  const auto all = [&] {
    bool ok = true;
    for (const int r : {1, 2, 4}) {
      ok = spd_root(p.view(), 1, with(r), inverse.view(), root.view(), first, *backend).ok() && ok;
      ok = multiply_spd_root(p.view(), 1, with(r), Side::left, g.view(), second, *backend).ok() &&
           ok;
    }
    return ok;
  };
  EXPECT_TRUE(all());
  const long before = count_new::calls;
  const bool ok = all();
  EXPECT_EQ(count_new::calls - before, 0);
  EXPECT_TRUE(ok);
}

// ---- eigenvectors -------------------------------------------------------------------------------

class Eigh : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Devices, Eigh, testing::Values("cpu", "reference"));

TEST_P(Eigh, TakesAMatrixApart) {
  const auto backend = open_backend(GetParam());
  for (const Index m : {1, 2, 3, 17, 64}) {
    const Spd exact = spd_of(m, 3, [](double i) { return std::cos(2 * i) * std::pow(10, -i / 9); });
    Matrix a = rounded<double>(exact.power(1));
    const Matrix symmetric = a;
    for (Index i = 0; i < m; ++i) {  // what is above the diagonal is not read
      for (Index j = i + 1; j < m; ++j) a(i, j) = 1e30;
    }
    Matrix v(m, m);
    std::vector<double> values(static_cast<std::size_t>(m));
    Work work(eigh_workspace_bytes(m));
    // The largest entry is asked for, so it must be finite: it is.
    eigh(a.view(), v.view(), values, work.span(), *backend);
    EXPECT_TRUE(work.end_untouched());
    EXPECT_TRUE(std::is_sorted(values.begin(), values.end()));
    std::vector<double> expected = exact.lambda;
    std::sort(expected.begin(), expected.end());
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(values[i], expected[i], 1e-14);
    const Matrix columns = zoo::transposed(v);
    EXPECT_LE(zoo::relative_error(zoo::Factors{columns, values, columns}.matrix(), symmetric),
              1e-13);
    Matrix one = zoo::product(v, columns);
    for (Index i = 0; i < m; ++i) one(i, i) -= 1;
    EXPECT_LE(zoo::frobenius(one), 1e-13);
  }
}

template <class T>
std::pair<Roots<T>, EighReport> eigh_roots(const Dense<T>& p, double exponent,
                                           const Damping& damping, Eigenvalues how,
                                           const char* device) {
  Roots<T> result{Dense<T>(p.rows, p.rows), Dense<T>(p.rows, p.rows), {}};
  Work work(spd_root_eigh_workspace_bytes(p.rows));
  const EighReport report = spd_root_eigh(p.view(), exponent, damping, how, result.inverse.view(),
                                          result.root.view(), work.span(), *open_backend(device));
  EXPECT_TRUE(work.end_untouched());
  return {std::move(result), report};
}

TEST_P(Eigh, HasRootsOfEveryExponent) {
  for (const Index m : {1, 2, 3, 17, 64}) {
    const Spd exact = conditioned(m, 1e8, 4);
    const Matrix p = rounded<double>(exact.power(1));
    for (const double e : {0.25, 0.5, 1.0, 0.1}) {
      const auto [result, report] = eigh_roots(p, e, {0, 0, 1e-6}, Eigenvalues::damp, GetParam());
      const double damping = 1e-6 * exact.frobenius();
      EXPECT_NEAR(report.damping, damping, 1e-12 * damping);
      EXPECT_NEAR(report.largest, 1, 1e-13);
      const auto damped = [&](double power) {
        return exact.map([=](double x) { return std::pow(x + damping, power); });
      };
      // 2^-53 of the norm is 1e-10 of the least eigenvalue, 1e-6.
      EXPECT_LE(zoo::relative_error(result.inverse, damped(-e)), 1e-9) << m << " " << e;
      EXPECT_LE(zoo::relative_error(result.root, damped(e)), 1e-11) << m << " " << e;
      EXPECT_TRUE(same_bits(result.inverse, zoo::transposed(result.inverse)));
      EXPECT_TRUE(same_bits(result.root, zoo::transposed(result.root)));
      // f32 in and out: rounded once each.
      const Dense<float> narrow = rounded<float>(p);
      const auto [f32, report32] =
          eigh_roots(narrow, e, {0, 0, 1e-5}, Eigenvalues::damp, GetParam());
      EXPECT_LE(zoo::relative_error(f32.inverse, judged(narrow, report32.damping).power(-e)), 1e-6);
    }
  }
}

TEST_P(Eigh, DoesWithEigenvaluesAsItIsTold) {
  Spd exact = conditioned(9, 100, 4);
  exact.lambda[8] = -0.2;
  exact.lambda[7] = 1e-3;
  const Matrix p = rounded<double>(exact.power(1));
  const auto expect = [&](Eigenvalues how, auto f) {
    const auto [result, report] = eigh_roots(p, 0.5, {0.05, 0, 0}, how, GetParam());
    EXPECT_NEAR(report.least, -0.2, 1e-14);
    EXPECT_EQ(report.negative, 1);
    EXPECT_LE(zoo::relative_error(result.inverse,
                                  exact.map([&](double x) { return 1 / std::sqrt(f(x)); })),
              1e-12);
    EXPECT_LE(
        zoo::relative_error(result.root, exact.map([&](double x) { return std::sqrt(f(x)); })),
        1e-12);
  };
  expect(Eigenvalues::damp, [](double x) { return std::max(x, 0.0) + 0.05; });
  expect(Eigenvalues::shift, [](double x) { return x + 0.2 + 0.05; });
  expect(Eigenvalues::clamp, [](double x) { return std::max(x, 0.05); });
}

/// Rows of v after so many iterations with p.
Matrix iterated(const Dense<float>& p, Matrix v, int times, std::vector<Index>& order,
                const char* device) {
  const auto backend = open_backend(device);
  order.assign(static_cast<std::size_t>(p.rows), -1);
  for (int i = 0; i < times; ++i) {
    Work work(orthogonal_iteration_workspace_bytes(p.rows));
    orthogonal_iteration(p.view(), v.view(), order, work.span(), *backend);
    EXPECT_TRUE(work.end_untouched());
  }
  return v;
}

TEST_P(Eigh, IteratesTowardsEigenvectorsFromAnyOthers) {
  for (const Index m : {Index{1}, Index{2}, Index{9}, Index{40}}) {
    const Spd spd = spd_of(m, 3, [](double i) { return std::pow(0.5, i); });
    std::vector<Index> order;
    const Matrix v = iterated(rounded<float>(spd.power(1)), zoo::orthonormal_columns(m, m, 8), 60,
                              order, GetParam());
    const Matrix gram = zoo::product(v, zoo::transposed(v));
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < m; ++j) EXPECT_NEAR(gram(i, j), i == j ? 1 : 0, 1e-13);
    }
    for (Index i = 0; i < std::min<Index>(m, 9); ++i) {  // the largest first, in ratios of 1/2
      double along = 0;
      for (Index j = 0; j < m; ++j) along += v(i, j) * spd.v(j, i);
      EXPECT_NEAR(std::abs(along), 1, 1e-5) << i;  // P is rounded to f32
    }
  }
}

TEST_P(Eigh, OrdersWhatItIterates) {
  // Eigenvectors already, in another order: they are put in order, and stay.
  Dense<float> p(4, 4);
  const float values[] = {2, 7, 0, 5};
  for (Index i = 0; i < 4; ++i) p(i, i) = values[i];
  Matrix axes(4, 4);
  for (Index i = 0; i < 4; ++i) axes(i, i) = 1;
  std::vector<Index> order;
  const Matrix v = iterated(p, axes, 1, order, GetParam());
  EXPECT_EQ(order, (std::vector<Index>{1, 3, 0, 2}));
  for (Index i = 0; i < 4; ++i) {
    EXPECT_NEAR(std::abs(v(i, order[static_cast<std::size_t>(i)])), 1, 1e-14);
  }
  iterated(p, v, 1, order, GetParam());
  EXPECT_EQ(order, (std::vector<Index>{0, 1, 2, 3}));
}

TEST_P(Eigh, LeavesANullSpaceItsBasis) {
  // Rank 3 of 8, rounded to f32: the other five rows stay what they were.
  const Index m = 8;
  const Matrix v = zoo::orthonormal_columns(m, m, 5);
  const Matrix p = zoo::Factors{v, {4, 2, 1, 0, 0, 0, 0, 0}, v}.matrix();
  std::vector<Index> order;
  const Matrix after = iterated(rounded<float>(p), zoo::transposed(v), 1, order, GetParam());
  for (Index i = 0; i < m; ++i) {
    double along = 0;
    for (Index j = 0; j < m; ++j) {
      along += after(i, j) * v(j, order[static_cast<std::size_t>(i)]);
    }
    // Of f32 rounding, 6e-8 of the norm, a tenth of the shift at most gets in.
    EXPECT_NEAR(std::abs(along), 1, 0.02) << i;
  }
}

TEST_P(Eigh, IteratesNothingThatIsNotFinite) {
  Dense<float> p(3, 3);
  p(1, 1) = std::numeric_limits<float>::quiet_NaN();
  std::vector<Index> order;
  EXPECT_THROW(iterated(p, zoo::orthonormal_columns(3, 3, 1), 1, order, GetParam()), NumericError);
}

TEST_P(Eigh, SaysWhatIsWrong) {
  Dense<float> p = rounded<float>(conditioned(6, 10, 2).power(1));
  const auto message = [&](const Dense<float>& x) {
    try {
      static_cast<void>(eigh_roots(x, 0.5, {0, 0, 0}, Eigenvalues::damp, GetParam()));
    } catch (const NumericError& e) {
      return std::string(e.what());
    }
    return std::string("nothing was thrown");
  };
  EXPECT_THAT(message(Dense<float>(6, 6)), HasSubstr("singular"));
  p(2, 4) = p(4, 2) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(message(p), HasSubstr("not finite"));
  p(2, 4) = p(4, 2) = std::numeric_limits<float>::infinity();
  EXPECT_THAT(message(p), HasSubstr("6x6 matrix: an entry is not finite"));
  EXPECT_THROW(eigh_roots(p, 0, {}, Eigenvalues::damp, GetParam()), ConfigError);
  EXPECT_THROW(eigh_roots(p, -0.5, {}, Eigenvalues::damp, GetParam()), ConfigError);
  EXPECT_THROW(eigh_roots(Dense<float>(3, 3), 1, {-1, 0, 0}, Eigenvalues::damp, GetParam()),
               ConfigError);
  Work work(1 << 16);
  Matrix v(6, 6);
  std::vector<double> values(5);
  EXPECT_THROW(eigh(p.view(), v.view(), values, work.span(), *open_backend(GetParam())),
               ShapeError);
  EXPECT_THROW(eigh(p.view(), p.view(), values, work.span(), *open_backend(GetParam())),
               ShapeError);
}

// The two ways to a root meet, where the one fails the other does not.
TEST_P(Eigh, IsWhatSpdRootFallsBackOn) {
  Spd exact = conditioned(24, 1e3, 4);
  for (const double least : {1e-3, -1e-2}) {
    exact.lambda.back() = least;
    const Dense<float> p = rounded<float>(exact.power(1));
    const Roots<float> iterated = roots_of(p, 1, with(4), GetParam());
    const auto [direct, report] = eigh_roots(p, 0.25, {0, 0, 1e-5}, Eigenvalues::damp, GetParam());
    EXPECT_EQ(iterated.report.ok(), least > 0);
    EXPECT_EQ(report.negative, least > 0 ? 0 : 1);
    if (iterated.report.ok()) {
      EXPECT_LE(zoo::relative_error(iterated.inverse, direct.inverse), 1e-4);
      EXPECT_LE(zoo::relative_error(iterated.root, direct.root), 1e-3);
    }
  }
}

}  // namespace
}  // namespace orthrus::kernels
