// Every LMO is the maximizer it claims to be: unit norm, ⟨X, lmo(X)⟩ = ‖X‖†, and no other unit
// matrix does better. All rows of the table are walked, so a new norm is tested by being there.
#include <gtest/gtest.h>

#include <orthrus/error.hpp>

#include "kernels/backend.hpp"
#include "optim/lmo.hpp"
#include "support/zoo.hpp"

namespace orthrus::optim {
namespace {

using zoo::Dense;

class EveryNorm : public testing::TestWithParam<std::string> {
 protected:
  Dense<float> lmo_of(const Dense<float>& x, int iterations = 9) {
    LmoConfig config;
    config.norm = GetParam();
    config.coefficients = "polar_express_101";
    config.iterations = iterations;  // converged to f32 for sigma >= 1e-3·|X|_F (table 2.7)
    const Lmo lmo(config);
    Dense<float> d = x;
    std::vector<std::byte> work(lmo.workspace_bytes(x.rows, x.cols) + 64);
    auto* at = work.data() + (64 - reinterpret_cast<std::uintptr_t>(work.data()) % 64) % 64;
    lmo(d.view(), {at, lmo.workspace_bytes(x.rows, x.cols)}, *backend_);
    return d;
  }
  const NormRow& row() {
    for (const NormRow& r : norms()) {
      if (r.name == GetParam()) return r;
    }
    throw std::logic_error("no such norm");
  }
  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
};

// f32 rounding of a converged iteration, relative: 1e-7 times a few dozen operations.
constexpr double f32_noise = 2e-5;

TEST_P(EveryNorm, LmoHasUnitNormAndAttainsTheDualNorm) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{3, 4}, {7, 3}, {5, 5}, {1, 9}, {9, 1}}) {
    const auto x = zoo::cast<float>(zoo::gaussian(rows, cols, 11));
    const auto d = lmo_of(x);
    EXPECT_NEAR(row().norm(d.view(), *backend_), 1, f32_noise);
    const double dual = row().dual_norm(x.view(), *backend_);
    EXPECT_NEAR(zoo::inner(x, d) / dual, 1, f32_noise) << rows << "x" << cols;
  }
}

TEST_P(EveryNorm, NoOtherUnitMatrixDoesBetter) {
  const auto x = zoo::cast<float>(zoo::gaussian(3, 4, 5));
  const double best = zoo::inner(x, lmo_of(x));
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    auto t = zoo::cast<float>(zoo::gaussian(3, 4, 100 + seed));
    const double norm = row().norm(t.view(), *backend_);
    EXPECT_LE(zoo::inner(x, t) / norm, best * (1 + f32_noise)) << "seed " << seed;
  }
}

TEST_P(EveryNorm, LmoIgnoresTheScaleOfItsArgument) {
  const auto x = zoo::gaussian(4, 6, 3);
  const auto one = lmo_of(zoo::cast<float>(x));
  for (const double c : {1e-30, 1e-20, 1e20, 1e30}) {
    // Scaling rounds each entry of X once more: 6e-8 relative.
    EXPECT_LE(zoo::relative_error(lmo_of(zoo::cast<float>(zoo::scaled(x, c))), one), 2e-5) << c;
  }
}

TEST_P(EveryNorm, ZeroStaysExactlyZero) {
  const Dense<float> zero(3, 5);
  for (const float v : lmo_of(zero).data) EXPECT_EQ(v, 0.0F);
}

std::vector<std::string> all_names() {
  std::vector<std::string> names;
  for (const NormRow& r : norms()) names.emplace_back(r.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(Table, EveryNorm, testing::ValuesIn(all_names()),
                         [](const auto& info) { return info.param; });

TEST(Norms, AgreeWithTheSvd) {
  auto backend = kernels::open_backend("reference");
  const auto x = zoo::power_law(6, 9, 2);
  const auto sigma = zoo::singular_values(x);
  double sum = 0;
  for (const double s : sigma) sum += s;
  for (const NormRow& r : norms()) {
    if (r.name != "spectral") continue;
    EXPECT_NEAR(r.norm(x.view(), *backend), sigma[0],
                1e-6 * sigma[0]);  // ln(m)/2^24 by construction
    EXPECT_NEAR(r.dual_norm(x.view(), *backend), sum, 1e-9 * sum);
  }
}

TEST(Scales, AreTheTableOfTheSpecification) {
  const auto scale = [](const char* name, Index a, Index b) {
    LmoConfig c;
    c.scale = name;
    return Lmo(c).scale(a, b);
  };
  EXPECT_DOUBLE_EQ(scale("original", 16, 4), 2);
  EXPECT_DOUBLE_EQ(scale("original", 4, 16), 1);
  EXPECT_DOUBLE_EQ(scale("match_rms_adamw", 4, 25), 1);
  EXPECT_DOUBLE_EQ(scale("rms_to_rms", 4, 16), 0.5);
  EXPECT_DOUBLE_EQ(scale("rms_to_rms_max", 4, 16), 1);
  EXPECT_DOUBLE_EQ(scale("rms_to_rms_max", 16, 4), 2);
  EXPECT_DOUBLE_EQ(scale("spectral", 16, 4), 1);
}

TEST(Lmo, NamesWhatItDoesNotKnow) {
  LmoConfig c;
  c.norm = "spectal";
  try {
    const Lmo lmo(c);
    FAIL();
  } catch (const ConfigError& e) {
    EXPECT_EQ(std::string(e.what()).find("'spectal' is not a norm; known: spectral, frobenius"),
              0U);
  }
}

// ---- the rational form -------------------------------------------------------------------------

class RationalLmo : public testing::TestWithParam<int> {
 protected:
  static Lmo lmo_of(const std::string& dtype = "f32") {
    LmoConfig config;
    config.coefficients = "rational";
    config.terms = GetParam();
    config.dtype = dtype;
    return Lmo(config);
  }
  static std::span<std::byte> aligned(std::vector<std::byte>& bytes) {
    auto* at = bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64;
    return {at, bytes.size() - 64};
  }
  /// How far uᵢᵀOvᵢ may be from 1: f's own error, and what the rounding of R in f32 moves.
  static double bound(const kernels::RationalSign& f, double x) {
    return f.error + 0x1p-24 / (x * x);
  }
  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
};
INSTANTIATE_TEST_SUITE_P(Terms, RationalLmo, testing::Values(2, 3, 4));

/// |uᵢᵀOvᵢ − 1| is within its bound for singular values from l·unit on. 0: σ_max, which is divided
/// by at most √(1.1·2) (zolotarev's interval ends at an upper bound of it).
template <class Bound>
void expect_orthogonal(const zoo::Matrix& x, const zoo::Matrix& o, double l, Bound bound,
                       double unit = 0) {
  const zoo::Factors f = zoo::svd(x);
  if (unit == 0) unit = 1.5 * f.sigma[0];
  int judged = 0;
  for (std::size_t k = 0; k < f.sigma.size(); ++k) {
    const double share = f.sigma[k] / unit;
    if (share < l) continue;
    double diagonal = 0;
    for (Index i = 0; i < x.rows; ++i) {
      for (Index j = 0; j < x.cols; ++j) {
        diagonal += f.u(i, static_cast<Index>(k)) * o(i, j) * f.v(j, static_cast<Index>(k));
      }
    }
    EXPECT_NEAR(diagonal, 1, bound(share))
        << "singular value " << k << " of " << x.rows << "x" << x.cols;
    ++judged;
  }
  EXPECT_GT(judged, 0);
}

TEST_P(RationalLmo, OrthogonalizesDownToItsSmallestSingularValue) {
  const Lmo lmo = lmo_of();
  ASSERT_NE(lmo.rational(24), nullptr);
  EXPECT_TRUE(lmo.iterations().empty());
  for (const auto& x : {zoo::gaussian(24, 60, 3), zoo::gaussian(60, 24, 4), zoo::flat(20, 20, 5),
                        zoo::condition(24, 40, 1e4, 6)}) {
    auto d = zoo::cast<float>(x);
    std::vector<std::byte> work(lmo.workspace_bytes(d.rows, d.cols) + 64);
    lmo(d.view(), aligned(work), *backend_);
    expect_orthogonal(x, zoo::cast<double>(d), lmo.rational(24)->l,
                      [&](double share) { return bound(*lmo.rational(24), share); });
  }
}

TEST_P(RationalLmo, OfAGramMatrixIsThatOfTheMatrix) {
  const Lmo lmo = lmo_of();
  ASSERT_TRUE(lmo.has_gram_form(24));
  const auto x = zoo::gaussian(24, 60, 7);
  auto r = zoo::cast<float>(zoo::product(x, zoo::transposed(x)));
  Dense<float> q(24, 24);
  std::vector<double> squares(24);
  std::vector<std::byte> work(lmo.gram_workspace_bytes(24) + 64);
  lmo.gram(r.view(), 0, q.view(), squares, aligned(work), *backend_);
  const zoo::Matrix o = zoo::product(zoo::cast<double>(q), x);
  expect_orthogonal(x, o, lmo.rational(24)->l,
                    [&](double share) { return bound(*lmo.rational(24), share); });
  for (Index i = 0; i < o.rows; ++i) {
    double sum = 0;
    for (Index j = 0; j < o.cols; ++j) sum += o(i, j) * o(i, j);
    // Rounded to f32 once per factor; condition 5.
    EXPECT_NEAR(squares[static_cast<std::size_t>(i)], sum, 1e-5 * sum);
  }
}

// ---- auto --------------------------------------------------------------------------------------

TEST(AutoCoefficients, AreAFunctionOfTheShortSideTheTypeAndTheConfiguration) {
  LmoConfig config;
  config.coefficients = "auto";
  const Lmo lmo(config);
  EXPECT_EQ(lmo.rational(95), nullptr);
  ASSERT_NE(lmo.rational(96), nullptr);
  EXPECT_EQ(lmo.rational(96)->r, 2);  // .0995 at 5e-3, by the specification's table
  EXPECT_EQ(lmo.description(96), "auto: rational, 2 terms");
  EXPECT_EQ(lmo.description(95),
            "auto, " + std::to_string(lmo.iterations().size()) + " iterations");
  config.dtype = "bf16";
  EXPECT_EQ(Lmo(config).rational(191), nullptr);
  EXPECT_NE(Lmo(config).rational(192), nullptr);
  EXPECT_EQ(Lmo(config, {.on_host = false}).rational(4096), nullptr);
  config.dtype = "f32";
  config.tolerance = 0.05;
  config.lower = 2e-3;
  EXPECT_EQ(Lmo(config).rational(4096)->r, 3);  // .0425
  config.tolerance = 0.02;
  config.lower = 1e-3;
  EXPECT_EQ(Lmo(config).rational(4096)->r, 4);  // .0189
  config.dtype = "bf16";                        // R is known to 9e-7, the smallest pole is 1.1e-6
  EXPECT_EQ(Lmo(config).rational(4096), nullptr);
  config.dtype = "f32";
  config.tolerance = 0.01;
  EXPECT_EQ(Lmo(config).rational(4096), nullptr);
  config.eps_mode = "add";
  config.tolerance = 0.1;
  EXPECT_EQ(Lmo(config).rational(4096), nullptr);
}

// bf16 has 8 bits: what no number of iterations can do in it is not accepted.
TEST(AutoCoefficients, RefuseAToleranceThatRoundingDoesNotAllow) {
  LmoConfig config;
  config.coefficients = "auto";
  config.dtype = "bf16";
  config.tolerance = 0.01;
  EXPECT_NO_THROW(Lmo{config});
  for (const double tolerance : {0.0099, 1e-3}) {
    config.tolerance = tolerance;
    for (const bool on_host : {true, false}) {
      try {
        const Lmo lmo(config, {.on_host = on_host});
        ADD_FAILURE() << "nothing was thrown";
      } catch (const ConfigError& e) {
        const std::string what = e.what();
        EXPECT_NE(what.find("lmo.tolerance: 0.00"), std::string::npos) << what;
        EXPECT_NE(what.find("at least 0.01, or lmo.dtype f32"), std::string::npos) << what;
      }
    }
  }
  config.dtype = "f32";
  EXPECT_NO_THROW(Lmo{config});
}

// The promise is about the scalar function: every x from `lower` on comes within `tolerance` of 1.
TEST(AutoCoefficients, HoldTheToleranceWithTheFewestIterations) {
  for (const double lower : {1e-1, 5e-3, 1e-3, 1e-5}) {
    for (const double tolerance : {0.3, 0.1, 1e-2, 1e-4}) {
      LmoConfig config;
      config.coefficients = "auto";
      config.lower = lower;
      config.tolerance = tolerance;
      const Lmo lmo(config, {.on_host = false});
      double worst = 0;
      for (int i = 0; i <= 10000; ++i) {
        const double x = std::pow(lower, 1 - i / 10000.0);
        worst = std::max(worst, std::abs(zoo::composed(lmo.iterations(), x / lmo.safety()) - 1));
      }
      EXPECT_LE(worst, tolerance * (1 + 1e-5)) << lower << " " << tolerance;  // between grid points
      // No composition of fewer quintics could: the optimal one does not.
      EXPECT_GE(std::ssize(lmo.iterations()), kernels::iterations_for(lower, tolerance));
      EXPECT_LE(std::ssize(lmo.iterations()), kernels::iterations_for(lower, tolerance) + 2);
    }
  }
}

TEST(AutoCoefficients, HoldTheToleranceOnMatrices) {
  const auto backend = kernels::open_backend("cpu");
  LmoConfig config;
  config.coefficients = "auto";
  const Lmo lmo(config);
  for (const auto& x : {zoo::gaussian(24, 60, 3), zoo::condition(40, 24, 100, 4),
                        zoo::gaussian(100, 130, 5), zoo::condition(130, 100, 100, 6)}) {
    auto d = zoo::cast<float>(x);
    const Index side = std::min(x.rows, x.cols);
    std::vector<std::byte> work(lmo.workspace_bytes(d.rows, d.cols) + 64);
    auto* at = work.data() + (64 - reinterpret_cast<std::uintptr_t>(work.data()) % 64) % 64;
    lmo(d.view(), {at, work.size() - 64}, *backend);
    const double unit = lmo.rational(side) != nullptr ? 0 : zoo::frobenius(x) * lmo.safety();
    expect_orthogonal(
        x, zoo::cast<double>(d), config.lower,
        [&](double share) { return config.tolerance + 0x1p-24 / (share * share); }, unit);
  }
}

TEST(Rational, RefusesWhatItCannotDo) {
  LmoConfig config;
  config.coefficients = "rational";
  config.terms = 5;
  EXPECT_THROW(Lmo{config}, ConfigError);
  config.terms = 4;
  config.dtype = "bf16";
  EXPECT_THROW(Lmo{config}, ConfigError);
  config.terms = 3;
  EXPECT_NO_THROW(Lmo{config});
  config.eps_mode = "add";
  EXPECT_THROW(Lmo{config}, ConfigError);
}

}  // namespace
}  // namespace orthrus::optim
