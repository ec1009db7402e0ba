// Rules against their formulas in f64, written out here once more.
#include <gtest/gtest.h>

#include <cmath>
#include <orthrus/error.hpp>

#include "runner.hpp"

namespace orthrus::optim {
namespace {

TEST(AdamW, IsItsFormula) {
  for (const bool moonlight : {false, true}) {
    const double lr = 0.01, wd = 0.1, b1 = 0.9, b2 = 0.95, eps = 1e-3;
    Matrix w = zoo::gaussian(5, 7, 1);
    Runner run(rule("adamw", {{"lr", lr},
                              {"weight_decay", wd},
                              {"betas", std::vector<double>{b1, b2}},
                              {"eps", eps},
                              {"eps_placement", std::string(moonlight ? "moonlight" : "torch")}}),
               w);
    Matrix m(5, 7);
    Matrix v(5, 7);
    for (int t = 1; t <= 20; ++t) {
      const Matrix g = zoo::gaussian(5, 7, 100 + static_cast<std::uint64_t>(t));
      const double c1 = 1 - std::pow(b1, t);
      const double c2 = 1 - std::pow(b2, t);
      double sum = 0;
      for (std::size_t i = 0; i < w.data.size(); ++i) {
        m.data[i] = b1 * m.data[i] + (1 - b1) * g.data[i];
        v.data[i] = b2 * v.data[i] + (1 - b2) * g.data[i] * g.data[i];
        const double root = moonlight ? (std::sqrt(v.data[i]) + eps) / std::sqrt(c2)
                                      : std::sqrt(v.data[i] / c2) + eps;
        const double u = m.data[i] / c1 / root;
        w.data[i] = (1 - lr * wd) * w.data[i] - lr * u;
        sum += u * u;
      }
      EXPECT_NEAR(run.step(g) / sum, 1, 1e-5);  // ΣU² of f32 values
    }
    EXPECT_LE(zoo::relative_error(run.weights, w), f32_bound);
  }
}

TEST(Sgd, IsItsFormulaInBothFormsWithAndWithoutNesterov) {
  for (const bool nesterov : {false, true}) {
    for (const bool ema : {false, true}) {
      const double lr = 0.1, wd = 0.01, beta = 0.9;
      Matrix w = zoo::gaussian(4, 3, 2);
      Runner run(rule("sgd", {{"lr", lr},
                              {"weight_decay", wd},
                              {"momentum", beta},
                              {"nesterov", nesterov},
                              {"momentum_form", std::string(ema ? "ema" : "heavy_ball")}}),
                 w);
      Matrix m(4, 3);
      const double a = ema ? 1 - beta : 1;
      for (int t = 1; t <= 20; ++t) {
        const Matrix g = zoo::gaussian(4, 3, 50 + static_cast<std::uint64_t>(t));
        for (std::size_t i = 0; i < w.data.size(); ++i) {
          m.data[i] = beta * m.data[i] + a * g.data[i];
          const double x = nesterov ? a * g.data[i] + beta * m.data[i] : m.data[i];
          w.data[i] = (1 - lr * wd) * w.data[i] - lr * x;
        }
        run.step(g);
      }
      EXPECT_LE(zoo::relative_error(run.weights, w), f32_bound) << nesterov << ema;
    }
  }
}

TEST(Muon, IsItsFormulaWithTheScalarPolynomialOnTheSvd) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 10}, {10, 6}, {8, 8}}) {
    for (const bool nesterov : {false, true}) {
      const double lr = 0.05, wd = 0.1, beta = 0.9;
      LmoConfig lmo;
      lmo.scale = "match_rms_adamw";
      Matrix w = zoo::gaussian(rows, cols, 3);
      Runner run(
          rule("muon",
               {{"lr", lr}, {"weight_decay", wd}, {"momentum", beta}, {"nesterov", nesterov}}),
          w, lmo);
      const auto iterations =
          kernels::first_iterations(*kernels::find_coefficients("polar_express_101"), 5);
      Matrix m(rows, cols);
      for (int t = 1; t <= 6; ++t) {
        const Matrix g = zoo::gaussian(rows, cols, 70 + static_cast<std::uint64_t>(t));
        Matrix x = m;
        for (std::size_t i = 0; i < m.data.size(); ++i) {
          m.data[i] = beta * m.data[i] + (1 - beta) * g.data[i];
          x.data[i] = nesterov ? (1 - beta) * g.data[i] + beta * m.data[i] : m.data[i];
        }
        const zoo::Factors f = zoo::svd(x);
        const double nu = 1.01 * f.frobenius();
        const Matrix d = f.map([&](double s) {
          double y = s / nu;
          for (const auto& p : iterations) y = p(y);
          return y;
        });
        const double scale = 0.2 * std::sqrt(static_cast<double>(std::max(rows, cols)));
        for (std::size_t i = 0; i < w.data.size(); ++i) {
          w.data[i] = (1 - lr * wd) * w.data[i] - lr * scale * d.data[i];
        }
        run.step(g);
      }
      // f32 Newton–Schulz: five products of length ≤ 10 amplify 6e-8 by the slope of p, below 1e3.
      EXPECT_LE(zoo::relative_error(run.weights, w), 1e-4) << rows << "x" << cols << nesterov;
    }
  }
}

TEST(Muon, MomentumConventionsWalkTheSamePath) {  // T1.5, to f32
  const Matrix w = zoo::gaussian(5, 8, 4);
  Runner ema(rule("muon", {{"momentum_form", std::string("ema")}}), w);
  Runner ball(rule("muon", {{"momentum_form", std::string("heavy_ball")}}), w);
  for (int t = 1; t <= 50; ++t) {
    const Matrix g = zoo::gaussian(5, 8, 200 + static_cast<std::uint64_t>(t));
    ema.step(g);
    ball.step(g);
  }
  EXPECT_LE(zoo::relative_error(ema.weights, ball.weights), 1e-4);  // 50 steps of f32 Newton–Schulz
}

TEST(Muon, OneRowIsNormalizedGradientDescent) {  // T1.6
  LmoConfig converged;
  converged.iterations = 9;
  const Matrix w = zoo::gaussian(1, 6, 5);
  Runner run(rule("muon", {{"momentum", 0.0}, {"lr", 0.5}}), w, converged);
  const Matrix g = zoo::gaussian(1, 6, 6);
  run.step(g);
  Matrix expected = w;
  const double norm = zoo::frobenius(g);
  for (std::size_t i = 0; i < w.data.size(); ++i) expected.data[i] -= 0.5 * g.data[i] / norm;
  EXPECT_LE(zoo::relative_error(run.weights, expected), f32_bound);
}

TEST(Muon, DiagonalGradientIsSignSgd) {  // T1.7
  LmoConfig converged;
  converged.iterations = 12;
  Matrix g(4, 4);
  const double entries[] = {3, -0.5, 0.1, -2};
  for (Index i = 0; i < 4; ++i) g(i, i) = entries[i];
  Runner run(rule("muon", {{"momentum", 0.0}, {"lr", 1.0}}), zoo::zero(4, 4), converged);
  run.step(g);
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 4; ++j) {
      EXPECT_NEAR(run.weights(i, j), i == j ? (entries[i] > 0 ? -1 : 1) : 0, 1e-5);
    }
  }
}

TEST(Muon, NoGradientIsPureDecayExactly) {  // T1.8
  const Matrix w = zoo::gaussian(3, 7, 8);
  Runner run(rule("muon", {{"lr", 0.5}, {"weight_decay", 0.5}}), w);
  run.step(zoo::zero(3, 7));
  const auto before = zoo::cast<float>(w);
  for (std::size_t i = 0; i < w.data.size(); ++i)
    EXPECT_EQ(run.weights.data[i], 0.75F * before.data[i]);
}

TEST(NorMuon, KeepsTheNormAndMakesRowsEqualInTheFirstStep) {  // T1.9
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 9}, {9, 6}}) {
    LmoConfig lmo;
    lmo.scale = "spectral";
    Runner run(rule("normuon", {{"lr", 1.0}, {"eps", 0.0}}), zoo::zero(rows, cols), lmo);
    const double sum = run.step(zoo::power_law(rows, cols, 9));
    const double norm = zoo::frobenius(run.weights);
    EXPECT_NEAR(norm / std::sqrt(sum), 1, 1e-6);  // W = −U
    // Newton–Schulz leaves Σp(σ)² of min(rows, cols): the first step's O is in [0.86, 1.14]² of it.
    EXPECT_NEAR(norm * norm / static_cast<double>(std::min(rows, cols)), 1, 0.3);
    for (Index i = 0; i < rows; ++i) {
      double row = 0;
      for (Index j = 0; j < cols; ++j)
        row += static_cast<double>(run.weights(i, j)) * run.weights(i, j);
      EXPECT_NEAR(std::sqrt(row), norm / std::sqrt(static_cast<double>(rows)), 1e-5 * norm);
    }
  }
}

TEST(NorMuon, IsItsFormula) {
  for (const bool long_axis : {false, true}) {
    const Index rows = 9, cols = 5;  // along the long side: one moment per column
    const double lr = 0.1, wd = 0.1, b2 = 0.9, eps = 1e-4;
    LmoConfig lmo;
    lmo.scale = "original";
    Matrix w = zoo::gaussian(rows, cols, 12);
    Runner run(rule("normuon", {{"lr", lr},
                                {"weight_decay", wd},
                                {"beta2", b2},
                                {"eps", eps},
                                {"axis", std::string(long_axis ? "long" : "rows")}}),
               w, lmo);
    std::vector<double> v(static_cast<std::size_t>(long_axis ? cols : rows));
    for (int t = 1; t <= 8; ++t) {
      // The LMO's answer is read off the run: only what NorMuon does with it is checked here.
      Dense<float> before = run.weights;
      run.step(zoo::gaussian(rows, cols, 300 + static_cast<std::uint64_t>(t)));
      Matrix o = zoo::cast<double>(run.direction);
      std::vector<double> mean(v.size());
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          mean[static_cast<std::size_t>(long_axis ? j : i)] +=
              o(i, j) * o(i, j) / static_cast<double>(long_axis ? rows : cols);
        }
      }
      for (std::size_t k = 0; k < v.size(); ++k) v[k] = b2 * v[k] + (1 - b2) * mean[k];
      Matrix p = o;
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j)
          p(i, j) /= std::sqrt(v[static_cast<std::size_t>(long_axis ? j : i)]) + eps;
      }
      const double restore = zoo::frobenius(o) / zoo::frobenius(p) * std::sqrt(9.0 / 5.0);
      for (std::size_t i = 0; i < w.data.size(); ++i) {
        const double expected =
            (1 - lr * wd) * static_cast<double>(before.data[i]) - lr * restore * p.data[i];
        EXPECT_NEAR(run.weights.data[i], expected, 1e-6);
      }
    }
  }
}

TEST(Rules, EveryRowBuildsFromItsDefaultsAndKnowsItsKind) {
  for (const RuleRow& row : rules()) {
    const auto built = make_rule({std::string(row.name), {}});
    EXPECT_EQ(built->is_matrix_rule(), row.matrix) << row.name;
    EXPECT_FALSE(row.doc.empty());
  }
  EXPECT_THROW((void)make_rule({"adam", {}}), ConfigError);
}

}  // namespace
}  // namespace orthrus::optim
