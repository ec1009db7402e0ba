// PRISM and Bidirectional-PRISM against their formulas in f64, by an SVD.
#include <gtest/gtest.h>

#include <cmath>
#include <orthrus/error.hpp>

#include "kernels/eigh.hpp"
#include "runner.hpp"

namespace orthrus::optim {
namespace {

constexpr double kDelta = 0x1p-23;  // what both damp a Gram matrix of f32 by, a share of its norm

/// f of a symmetric positive semidefinite matrix.
template <class F>
Matrix spectral(const Matrix& p, F f) {
  zoo::Factors factors = zoo::svd(p);
  // Of a semidefinite matrix U and V are equal but where σ is 0, and U has no column there.
  factors.u = factors.v;
  return factors.map(f);
}

Matrix sum(Matrix a, double factor, const Matrix& b) {
  for (std::size_t i = 0; i < a.data.size(); ++i) a.data[i] += factor * b.data[i];
  return a;
}
Matrix gram_of_rows(const Matrix& x) { return zoo::product(x, zoo::transposed(x)); }
Matrix gram_of_columns(const Matrix& x) { return zoo::product(zoo::transposed(x), x); }

double trace(const Matrix& p) {
  double t = 0;
  for (Index i = 0; i < p.rows; ++i) t += p(i, i);
  return t;
}
double spectral_norm(const Dense<float>& x) { return zoo::singular_values(x).front(); }

/// [X, Y] or [X; Y].
Matrix stacked(const Matrix& x, const Matrix& y, bool beside) {
  Matrix z(beside ? x.rows : 2 * x.rows, beside ? 2 * x.cols : x.cols);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < x.cols; ++j) {
      z(i, j) = x(i, j);
      z(beside ? i : i + x.rows, beside ? j + x.cols : j) = y(i, j);
    }
  }
  return z;
}
Matrix first_block(const Matrix& z, Index rows, Index cols) {
  Matrix x(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) x(i, j) = z(i, j);
  }
  return x;
}

/// Makes directions of one matrix.
class Maker {
 public:
  explicit Maker(const RuleConfig& rule, LmoConfig lmo = {}) : rule_(make_rule(rule)), lmo_(lmo) {}

  const MatrixRule& matrix_rule() const { return dynamic_cast<const MatrixRule&>(*rule_); }
  const Direction& direction() const { return matrix_rule().direction(); }

  /// D of momentum and gradient in step `t`.
  Dense<float> operator()(const Matrix& momentum, const Matrix& gradient, std::int64_t t = 2) {
    Dense<float> x = zoo::cast<float>(momentum);
    Dense<float> g = zoo::cast<float>(gradient);
    direction().make({x.view(), g.view()}, lmo_, {t, 0, 0},
                     work(direction().workspace_bytes(lmo_, x.rows, x.cols)), *backend_);
    return x;
  }
  /// D, and C = P⁻¹E of an E.
  std::pair<Dense<float>, Dense<float>> undo(const Matrix& momentum, const Matrix& gradient,
                                             const Dense<float>& e) {
    Dense<float> x = zoo::cast<float>(momentum);
    Dense<float> g = zoo::cast<float>(gradient);
    const std::size_t bytes = direction().root_workspace_bytes(lmo_, x.rows, x.cols);
    std::vector<std::byte> root(direction().root_bytes(lmo_, x.rows, x.cols) + 256,
                                std::byte{0x7f});
    const std::span<std::byte> of_root = aligned(root);
    direction().make_with_root({x.view(), g.view()}, lmo_, {2, 0, 0}, of_root, work(bytes),
                               *backend_);
    Dense<float> c(x.rows, x.cols);
    direction().undo(lmo_, {2, 0, 0}, of_root, {}, e.view(), c.view(), work(bytes), *backend_);
    return {x, c};
  }

 private:
  static std::span<std::byte> aligned(std::vector<std::byte>& bytes) {
    const auto from = reinterpret_cast<std::uintptr_t>(bytes.data()) % 256;
    return std::span(bytes).subspan(from == 0 ? 0 : 256 - from, bytes.size() - 256);
  }
  std::span<std::byte> work(std::size_t bytes) {
    work_.assign(bytes + 256, std::byte{0x7f});  // f32 and f64 far beyond anything here
    return aligned(work_);
  }

  std::unique_ptr<Rule> rule_;
  Lmo lmo_;
  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
  std::vector<std::byte> work_;
};

// Of 6×12 a stack is square.
constexpr std::pair<Index, Index> kShapes[] = {{6, 20}, {20, 6}, {9, 9}, {6, 9}, {9, 6},
                                               {6, 12}, {12, 6}, {1, 7}, {7, 1}};
const char* const kSides[] = {"left", "right", "short", "long"};

bool is_left(const std::string& side, Index rows, Index cols) {
  return side == "left" || (side == "short" && rows <= cols) || (side == "long" && rows > cols);
}

RuleConfig prism(double gamma, const std::string& side = "short") {
  return rule("prism", {{"gamma", gamma}, {"side", side}});
}
RuleConfig bidirectional(double left, double right, double eps = 1e-6) {
  return rule("bidirectional_prism", {{"gamma_left", left}, {"gamma_right", right}, {"eps", eps}});
}

/// D of the two-sided form as it is defined, with a matrix of the long side.
Matrix bidirectional_oracle(const Matrix& m, const Matrix& n, double left, double right,
                            double eps) {
  const Matrix l = sum(gram_of_rows(m), left * left, gram_of_rows(n));
  const Matrix r = sum(gram_of_columns(m), right * right, gram_of_columns(n));
  const auto side = static_cast<double>(std::min(m.rows, m.cols));
  const auto root = [&](const Matrix& p) {
    const double delta = eps * trace(p) / side + kDelta * zoo::frobenius(p);
    return spectral(p, [&](double x) { return std::pow(x + delta, -0.25); });
  };
  return zoo::product(zoo::product(root(l), m), root(r));
}

// f32 Newton–Schulz: five products amplify 6e-8 by the slope of p, below 1e3 (as for Muon).
constexpr double kIterated = 1e-4;
// A Gram matrix is rounded to f32 once: 6e-8 of its norm, lifted by a fourth root of what is at
// least 1e-6 of the mean eigenvalue.
constexpr double kRooted = 2e-3;

TEST(Prism, IsItsFormulaOnEverySide) {  // T8.2, with the scalar polynomial on an SVD
  const auto iterations =
      kernels::first_iterations(*kernels::find_coefficients("polar_express_101"), 5);
  for (const auto& [rows, cols] : kShapes) {
    for (const std::string side : kSides) {
      const double lr = 0.05, wd = 0.1, beta = 0.9, gamma = 0.7;
      Matrix w = zoo::gaussian(rows, cols, 3);
      Runner run(rule("prism", {{"lr", lr},
                                {"weight_decay", wd},
                                {"momentum", beta},
                                {"gamma", gamma},
                                {"side", side}}),
                 w);
      Matrix m(rows, cols);
      for (int t = 1; t <= 6; ++t) {
        const Matrix g = zoo::gaussian(rows, cols, 70 + static_cast<std::uint64_t>(t));
        m = sum(zoo::scaled(m, beta), 1 - beta, g);
        const Matrix noise = zoo::scaled(sum(g, -1, m), gamma);
        const Matrix z = stacked(m, noise, is_left(side, rows, cols));
        const Matrix d = first_block(
            zoo::polynomial_oracle(z, iterations, 1.01 * zoo::frobenius(z)), rows, cols);
        const double scale = std::sqrt(std::max(1.0, static_cast<double>(rows) / cols));
        w = sum(zoo::scaled(w, 1 - lr * wd), -lr * scale, d);
        run.step(g);
      }
      EXPECT_LE(zoo::relative_error(run.weights, w), kIterated) << rows << "x" << cols << side;
    }
  }
}

TEST(Prism, IsTheInverseRootTimesTheMomentumWhereTheIterationConverges) {
  LmoConfig lmo;
  lmo.coefficients = "polar_express";
  lmo.iterations = 10;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 20}, {20, 6}, {8, 8}}) {
    const Matrix m = zoo::gaussian(rows, cols, 1);
    const Matrix n = zoo::gaussian(rows, cols, 2);
    const Matrix g = sum(n, 1, m);
    const auto root = [](const Matrix& p) {
      return spectral(p, [](double x) { return x > 1e-12 ? 1 / std::sqrt(x) : 0.0; });
    };
    const Matrix left = zoo::product(root(sum(gram_of_rows(m), 0.25, gram_of_rows(n))), m);
    const Matrix right = zoo::product(m, root(sum(gram_of_columns(m), 0.25, gram_of_columns(n))));
    // The table ends within 1e-6 of 1; rounding of ten f32 iterations is what is left.
    EXPECT_LE(zoo::relative_error(Maker(prism(0.5, "left"), lmo)(m, g), left), 1e-3) << rows;
    EXPECT_LE(zoo::relative_error(Maker(prism(0.5, "right"), lmo)(m, g), right), 1e-3) << rows;
  }
}

TEST(BidirectionalPrism, IsItsFormulaThoughNoMatrixOfTheLongSideIsFormed) {  // T8.5
  for (const auto& [rows, cols] : kShapes) {
    for (const auto& [left, right] :
         {std::pair{1.0, 1.0}, {0.5, 2.0}, {0.0, 1.0}, {1.0, 0.0}, {0.0, 0.0}}) {
      const Matrix m = zoo::gaussian(rows, cols, 11);
      const Matrix g = sum(zoo::gaussian(rows, cols, 12), 1, m);
      const Matrix d = bidirectional_oracle(m, sum(g, -1, m), left, right, 1e-6);
      EXPECT_LE(zoo::relative_error(Maker(bidirectional(left, right))(m, g), d), 1e-4)
          << rows << "x" << cols << " " << left << " " << right;
    }
  }
}

TEST(BidirectionalPrism, IsItsFormulaOnEverySpectrum) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{8, 20}, {20, 8}, {12, 12}}) {
    for (const zoo::Inhabitant& x : zoo::inhabitants(rows, cols, 4)) {
      const double scale = zoo::frobenius(x.matrix) / std::sqrt(static_cast<double>(rows * cols));
      const Matrix noise = zoo::scaled(zoo::gaussian(x.matrix.rows, x.matrix.cols, 5), scale / 2);
      const Matrix d = bidirectional_oracle(x.matrix, noise, 1, 1, 1e-6);
      const Dense<float> made = Maker(bidirectional(1, 1))(x.matrix, sum(noise, 1, x.matrix));
      if (x.name == "zero") {
        EXPECT_EQ(zoo::frobenius(made), 0);
      } else {
        EXPECT_LE(zoo::relative_error(made, d), kRooted) << x.name << rows;
      }
    }
  }
}

TEST(Prism, WithoutGammaIsMuon) {  // T8.1
  for (const auto& [rows, cols] : kShapes) {
    const Matrix m = zoo::gaussian(rows, cols, 21);
    const Matrix g = zoo::gaussian(rows, cols, 22);
    const Dense<float> muon = Maker(rule("muon"))(m, g);
    for (const std::string side : kSides) {
      EXPECT_LE(zoo::relative_error(Maker(prism(0, side))(m, g), muon), 1e-5) << rows << side;
    }
    // σ/(σ² + δ)^½, δ about 1e-6 of the mean of σ²: a σ of a tenth of the mean is 5e-5 short.
    EXPECT_LE(zoo::relative_error(Maker(bidirectional(0, 0, 0))(m, g), zoo::msign_oracle(m)), 1e-3);
  }
}

TEST(Prism, WithoutInnovationIsMuon) {  // T8.4
  for (const auto& [rows, cols] : kShapes) {
    const Matrix m = zoo::gaussian(rows, cols, 23);
    const Dense<float> muon = Maker(rule("muon"))(m, m);
    for (const std::string side : kSides) {
      EXPECT_LE(zoo::relative_error(Maker(prism(3, side))(m, m), muon), 1e-5) << rows << side;
    }
    EXPECT_LE(zoo::relative_error(Maker(bidirectional(3, 2, 0))(m, m), zoo::msign_oracle(m)), 1e-3);
  }
}

TEST(BidirectionalPrism, IsNeverLongerThanOne) {  // T8.3
  std::mt19937_64 bits(7);
  std::uniform_int_distribution<Index> side(1, 12);
  std::uniform_real_distribution<double> gamma(0, 3);
  for (std::uint64_t k = 0; k < 300; ++k) {
    const Index rows = side(bits);
    const Index cols = side(bits);
    const Matrix m = zoo::gaussian(rows, cols, 2 * k);
    const Matrix g = zoo::scaled(zoo::gaussian(rows, cols, 2 * k + 1), gamma(bits));
    const double norm = spectral_norm(Maker(bidirectional(gamma(bits), gamma(bits)))(m, g));
    EXPECT_LE(norm, 1 + 1e-5) << rows << "x" << cols;  // f32
    EXPECT_GT(norm, 0);
  }
}

TEST(Prism, SingularValuesFallWithGamma) {  // T8.6, T8.7
  const Matrix m = zoo::gaussian(6, 15, 31);
  const Matrix g = sum(zoo::gaussian(6, 15, 32), 1, m);
  LmoConfig lmo;
  lmo.coefficients = "polar_express";
  lmo.iterations = 10;
  std::vector<double> before(6, 2.0);
  for (const double gamma : {0.0, 0.25, 0.5, 1.0, 2.0, 4.0}) {
    const auto sigma = zoo::singular_values(Maker(prism(gamma), lmo)(m, g));
    for (std::size_t i = 0; i < sigma.size(); ++i) {
      EXPECT_LE(sigma[i], before[i] + 1e-4) << gamma;
      if (gamma > 0) {
        EXPECT_LT(sigma[i], before[i] * 0.999) << gamma;
      }
    }
    before = sigma;
  }
  // N has full rank: D ~ 1/γ.
  const double at_64 = spectral_norm(Maker(prism(64), lmo)(m, g));
  const double at_256 = spectral_norm(Maker(prism(256), lmo)(m, g));
  EXPECT_NEAR(at_64 / at_256, 4, 0.02);
}

TEST(Prism, DoesNotKnowHowLargeItsGradientsAre) {  // T8.8
  const Matrix m = zoo::gaussian(6, 15, 41);
  const Matrix g = zoo::gaussian(6, 15, 42);
  for (const RuleConfig& r : {prism(1), prism(1, "long"), bidirectional(1, 2)}) {
    const Dense<float> d = Maker(r)(m, g);
    for (const double c : {0x1p-90, 0x1p-3, 0x1p10, 0x1p90}) {
      EXPECT_LE(zoo::relative_error(Maker(r)(zoo::scaled(m, c), zoo::scaled(g, c)), d), 1e-6)
          << r.name << c;
    }
  }
}

TEST(Prism, DampsItsFirstStepAsDocumentedOrNotAtAll) {  // T8.9
  LmoConfig lmo;
  lmo.coefficients = "polar_express";
  lmo.iterations = 10;
  const double beta = 0.95;
  const Matrix g = zoo::gaussian(6, 15, 51);
  const Matrix m = zoo::scaled(g, 1 - beta);
  const Matrix sign = zoo::msign_oracle(g);
  for (const double gamma : {0.5, 1.0, 2.0}) {
    const double ratio = gamma * beta / (1 - beta);
    for (const std::string side : kSides) {
      const auto damped = [&](bool damps, std::int64_t t) {
        RuleConfig config = prism(gamma, side);
        config.values["damp_first_step"] = damps;
        return Maker(config, lmo)(m, g, t);
      };
      const Matrix expected = zoo::scaled(sign, 1 / std::sqrt(1 + ratio * ratio));
      EXPECT_LE(zoo::relative_error(damped(true, 1), expected), 1e-3) << side;
      EXPECT_LE(zoo::relative_error(damped(false, 1), sign), 1e-3) << side;
      EXPECT_LE(zoo::relative_error(damped(false, 2), expected), 1e-3) << side;
    }
  }
  EXPECT_NEAR(1 / std::sqrt(1 + 19.0 * 19.0), 0.0526, 5e-5);  // the number of the spec
}

TEST(Prism, EcoFindsTheMomentumThatADirectionIsOf) {  // 8.5: P⁻¹D = X
  for (const auto& [rows, cols] : kShapes) {
    const Matrix m = zoo::gaussian(rows, cols, 61);
    const Matrix g = sum(zoo::scaled(zoo::gaussian(rows, cols, 62), 0.7), 1, m);
    for (const std::string side : kSides) {
      LmoConfig lmo;
      lmo.coefficients = "polar_express";
      lmo.iterations = 10;
      Maker maker(prism(0.8, side), lmo);
      const Dense<float> d = maker(m, g);
      const auto [again, x] = maker.undo(m, g, d);
      EXPECT_LE(zoo::relative_error(again, d), 1e-6) << side;
      EXPECT_LE(zoo::relative_error(x, m), 1e-3) << rows << "x" << cols << side;
    }
    Maker both(bidirectional(0.8, 1.3));
    const Dense<float> d = both(m, g);
    const auto [again, x] = both.undo(m, g, d);
    EXPECT_EQ(again.data, d.data);
    EXPECT_LE(zoo::relative_error(x, m), 1e-3) << rows << "x" << cols;  // four roots in f32
  }
}

TEST(Prism, EcoAppliesTheRootOfTheFactorsToAnyResidual) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 20}, {20, 6}, {9, 9}}) {
    const Matrix m = zoo::gaussian(rows, cols, 63);
    const Matrix n = zoo::gaussian(rows, cols, 64);
    const Matrix g = sum(n, 1, m);
    const Matrix e = zoo::gaussian(rows, cols, 65);
    const auto power = [](const Matrix& p, double exponent, double share) {
      const auto side = static_cast<double>(std::min(p.rows, p.cols));
      const double delta = share * trace(p) / side + (share > 0 ? kDelta * zoo::frobenius(p) : 0);
      return spectral(p, [&](double x) { return std::pow(x + delta, exponent); });
    };
    LmoConfig lmo;
    lmo.coefficients = "polar_express";
    lmo.iterations = 10;
    const auto left = sum(gram_of_rows(m), 0.49, gram_of_rows(n));
    const auto right = sum(gram_of_columns(m), 0.49, gram_of_columns(n));
    const Dense<float> single = zoo::cast<float>(e);
    EXPECT_LE(zoo::relative_error(Maker(prism(0.7, "left"), lmo).undo(m, g, single).second,
                                  zoo::product(power(left, 0.5, 0), e)),
              1e-3)
        << rows;
    EXPECT_LE(zoo::relative_error(Maker(prism(0.7, "right"), lmo).undo(m, g, single).second,
                                  zoo::product(e, power(right, 0.5, 0))),
              1e-3)
        << rows;
    // δ of the long side's factor is a share of the mean over the short side's directions.
    const auto root = [&](const Matrix& p) {
      const double side = static_cast<double>(std::min(rows, cols));
      const double delta = 1e-6 * trace(p) / side + kDelta * zoo::frobenius(p);
      return spectral(p, [&](double x) { return std::pow(x + delta, 0.25); });
    };
    EXPECT_LE(zoo::relative_error(Maker(bidirectional(0.7, 0.7)).undo(m, g, single).second,
                                  zoo::product(zoo::product(root(left), e), root(right))),
              1e-3)
        << rows;
  }
}

TEST(Prism, WhatHasNoMomentumHasNoStepAndNothingToUndo) {
  const Matrix zero(6, 20);
  const Dense<float> e = zoo::cast<float>(zoo::gaussian(6, 20, 81));
  for (const RuleConfig& config : {prism(1, "short"), prism(1, "long"), bidirectional(1, 1)}) {
    const auto [d, c] = Maker(config).undo(zero, zero, e);
    for (const float x : d.data) EXPECT_EQ(x, 0) << config.name;
    for (const float x : c.data) EXPECT_EQ(x, 0) << config.name;
  }
}

TEST(BidirectionalPrism, TakesNoSideThatLapackCannotCount) {
  const Maker maker(bidirectional(1, 1));
  const Index most = kernels::largest_eigh_side / 2;
  const auto why = [&](Index rows, Index cols) {
    return maker.direction().obstacle(Mode::exchange, rows, cols, true, false);
  };
  EXPECT_EQ(why(most, most + 1), "");
  EXPECT_NE(why(most + 1, most + 1).find("32002"), std::string::npos) << why(most + 1, most + 1);
}

TEST(Prism, OfAGradientThatIsNotFiniteIsNotMade) {
  Matrix m = zoo::gaussian(4, 6, 1);
  Matrix g = zoo::gaussian(4, 6, 2);
  g(1, 2) = std::nan("");
  EXPECT_THROW(Maker(bidirectional(1, 1))(m, g), NumericError);
  const Dense<float> d = Maker(prism(1))(m, g);
  EXPECT_TRUE(std::isnan(zoo::frobenius(d)));
}

}  // namespace
}  // namespace orthrus::optim
