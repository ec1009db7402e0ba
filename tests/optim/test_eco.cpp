// ECO in f64, written out here: what kappa promises holds for any quantizer. And P⁻¹ of every norm.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "kernels/device_memory.hpp"
#include "optim/eco.hpp"
#include "runner.hpp"

namespace orthrus::optim {
namespace {

// ---- scalar training runs in f64 ----------------------------------------------------------------

constexpr int kSize = 16;
using Vector = std::vector<double>;
using Quantizer = std::function<double(double w, int step, int i)>;

double to_nearest(double w, int, int) { return std::nearbyint(w / 0.05) * 0.05; }
/// Unbiased, from a hash of (step, entry): the same numbers for whoever asks.
double stochastic(double w, int step, int i) {
  std::mt19937_64 bits(static_cast<std::uint64_t>(step) * 1000003U + static_cast<unsigned>(i));
  const double z = w / 0.05;
  const double below = std::floor(z);
  const double u = static_cast<double>(bits() >> 11) * 0x1p-53;
  return 0.05 * (below + (u < z - below ? 1 : 0));
}
double to_zero(double, int, int) { return 0; }

struct Setting {
  double beta = 0.9, decay = 0;
  bool nesterov = false;
  int steps = 200;
  std::function<double(int)> lr = [](int) { return 0.1; };

  [[nodiscard]] MomentumGain gain() const { return {nesterov ? beta * beta : beta, beta}; }
  [[nodiscard]] double rho(int t) const { return 1 - lr(t) * decay; }
};

/// One SGD run with momentum on rounded weights. `pull_back(t, M̃, E, E before)` makes M of it.
struct Training {
  Vector rounded = Vector(kSize), momentum = Vector(kSize), wide = Vector(kSize);
  Vector error = Vector(kSize);
};
using PullBack = std::function<double(int t, double m, double e, double before)>;
/// G: a fixed function of step and entry, and of the weights it is taken at.
double gradient(int t, int i, double w) { return std::sin(0.7 * t + i) + 0.3 * (w - 0.1 * i); }

void step(const Setting& s, int t, const Quantizer& q, const PullBack& pull_back, Training& run,
          const Vector* gradients = nullptr) {
  for (int i = 0; i < kSize; ++i) {
    const auto k = static_cast<std::size_t>(i);
    const double g = gradients != nullptr ? (*gradients)[k] : gradient(t, i, run.rounded[k]);
    const double m = s.beta * run.momentum[k] + (1 - s.beta) * g;
    const double x = s.nesterov ? s.beta * m + (1 - s.beta) * g : m;
    run.wide[k] = s.rho(t) * run.rounded[k] - s.lr(t) * x;
    run.rounded[k] = q(run.wide[k], t, i);
    const double before = run.error[k];
    run.error[k] = run.wide[k] - run.rounded[k];
    run.momentum[k] = pull_back(t, m, run.error[k], before);
  }
}

double cosine(int t) { return 0.02 + 0.08 * 0.5 * (1 + std::cos(3.14159265358979 * t / 210)); }

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const double decay : {0.0, 0.5}) {
    for (const bool nesterov : {false, true}) {
      Setting s;
      s.decay = decay;
      s.nesterov = nesterov;
      all.push_back(s);
    }
  }
  return all;
}

// The memory-hungry form, which this library only judges by: with the error of the step before at
// hand, W̃ is that of a run with a master copy, bit for rounding bit.
TEST(Eco, WithThePreviousErrorIsTheMasterRun) {
  for (Setting s : settings()) {
    for (const bool scheduled : {false, true}) {
      if (scheduled && s.nesterov) continue;
      if (scheduled) s.lr = cosine;
      for (const Quantizer& q : {Quantizer(to_nearest), Quantizer(stochastic)}) {
        Training eco;
        Vector master(kSize);
        Vector of_master(kSize);
        const double nesterov = s.nesterov ? s.beta : 1;
        for (int t = 1; t <= s.steps; ++t) {
          Vector gradients(kSize);
          for (int i = 0; i < kSize; ++i) {
            const auto k = static_cast<std::size_t>(i);
            const double rounded = t == 1 ? 0 : q(master[k], t - 1, i);
            ASSERT_NEAR(rounded, eco.rounded[k], 1e-12);
            gradients[k] = gradient(t, i, rounded);
            const double m = s.beta * of_master[k] + (1 - s.beta) * gradients[k];
            const double x = s.nesterov ? s.beta * m + (1 - s.beta) * gradients[k] : m;
            of_master[k] = m;
            master[k] = s.rho(t) * master[k] - s.lr(t) * x;
          }
          step(
              s, t, q,
              [&](int at, double m, double e, double before) {
                return m + s.rho(at) / (s.lr(at) * nesterov) * before -
                       s.rho(at + 1) / (s.beta * nesterov * s.lr(at + 1)) * e;
              },
              eco, &gradients);
          for (std::size_t k = 0; k < kSize; ++k) {
            // Gaps of two runs that only round differently: 200 steps of 1e-16, and room.
            ASSERT_NEAR(eco.wide[k], master[k], 1e-13) << "step " << t;
          }
        }
      }
    }
  }
}

/// The largest |Φ − Φ*| over a run, Φ = Ŵ − sM, with gradients that both are given.
double worst_gap(const Setting& s, const Quantizer& q, const std::vector<double>& kappas) {
  Training run;
  Vector master(kSize);
  Vector of_master(kSize);
  double worst = 0;
  for (int t = 1; t <= s.steps; ++t) {
    Vector gradients(kSize);
    for (int i = 0; i < kSize; ++i) {
      const auto k = static_cast<std::size_t>(i);
      gradients[k] = gradient(t, i, run.rounded[k]);
      const double m = s.beta * of_master[k] + (1 - s.beta) * gradients[k];
      const double x = s.nesterov ? s.beta * m + (1 - s.beta) * gradients[k] : m;
      of_master[k] = m;
      master[k] = s.rho(t) * master[k] - s.lr(t) * x;
    }
    const double kappa = kappas[static_cast<std::size_t>(t - 1)];
    step(
        s, t, q, [&](int, double m, double e, double) { return m + kappa * e; }, run, &gradients);
    // What one unit of momentum still takes from the weights, from the next step on.
    const auto exact = schedule_kappas(s.gain(), s.decay, s.steps,
                                       [&](std::int64_t at) { return s.lr(static_cast<int>(at)); });
    const double returns = -1 / exact[static_cast<std::size_t>(t - 1)];
    for (std::size_t k = 0; k < kSize; ++k) {
      worst = std::max(worst, std::abs((run.rounded[k] - returns * run.momentum[k]) -
                                       (master[k] - returns * of_master[k])));
    }
  }
  return worst;
}

std::vector<double> constant_kappas(Kappa kind, const Setting& s) {
  return std::vector<double>(static_cast<std::size_t>(s.steps),
                             kappa(kind, s.gain(), s.lr(1), s.decay));
}

TEST(Eco, PhiMovesAsWithoutRoundingWhateverTheQuantizer) {
  for (const Setting& s : settings()) {
    for (const Quantizer& q : {Quantizer(to_nearest), Quantizer(stochastic), Quantizer(to_zero)}) {
      EXPECT_LE(worst_gap(s, q, constant_kappas(Kappa::exact, s)), 1e-13)
          << "decay " << s.decay << " nesterov " << s.nesterov;
    }
  }
}

TEST(Eco, PhiMovesAsWithoutRoundingUnderASchedule) {
  for (Setting s : settings()) {
    s.lr = cosine;
    const auto kappas = schedule_kappas(
        s.gain(), s.decay, s.steps, [&](std::int64_t t) { return cosine(static_cast<int>(t)); });
    EXPECT_LE(worst_gap(s, stochastic, kappas), 1e-12) << s.decay << " " << s.nesterov;
    // One constant for all steps does not do it.
    EXPECT_GT(worst_gap(s, stochastic, constant_kappas(Kappa::exact, s)), 1e-3);
  }
}

// A wrong constant must be seen: the published one leaves λE of every step.
TEST(Eco, ThePublishedKappasAreShortWhereWeightsDecay) {
  Setting s;
  s.decay = 0.5;
  EXPECT_GT(worst_gap(s, to_nearest, constant_kappas(Kappa::blog, s)), 1e-3);
  EXPECT_GT(worst_gap(s, to_nearest, constant_kappas(Kappa::paper, s)), 1e-3);
  s.decay = 0;
  for (const Kappa kind : {Kappa::blog, Kappa::paper}) {
    EXPECT_LE(worst_gap(s, to_nearest, constant_kappas(kind, s)), 1e-13);
  }
}

TEST(Eco, KappasAreTheirFormulas) {
  const double lr = 0.03, decay = 0.4, beta = 0.9;
  const double rho = 1 - lr * decay;
  const MomentumGain plain{beta, beta};
  const MomentumGain nesterov{beta * beta, beta};
  EXPECT_NEAR(kappa(Kappa::blog, plain, lr, decay), rho / lr * (1 - 1 / beta), 1e-12);
  EXPECT_NEAR(kappa(Kappa::paper, plain, lr, decay), 1 / lr * (1 - 1 / beta), 1e-12);
  EXPECT_NEAR(kappa(Kappa::exact, plain, lr, decay), 1 / lr * (1 - rho / beta), 1e-12);
  EXPECT_NEAR(kappa(Kappa::exact, plain, lr, decay), kappa(Kappa::blog, plain, lr, decay) + decay,
              1e-12);
  EXPECT_NEAR(kappa(Kappa::exact, nesterov, lr, decay), -(rho - beta) / (lr * beta * beta), 1e-12);
  // A schedule that does not move is a constant.
  const auto flat = schedule_kappas(nesterov, decay, 50, [&](std::int64_t) { return lr; });
  for (const double k : flat) EXPECT_NEAR(k / kappa(Kappa::exact, nesterov, lr, decay), 1, 1e-12);
}

// One error, then neither gradients nor rounding: all of it comes back.
TEST(Eco, AnErrorComesBackWhole) {
  for (const bool nesterov : {false, true}) {
    Setting s;
    s.nesterov = nesterov;
    const double e = 0.37;
    double m = kappa(Kappa::exact, s.gain(), s.lr(1), 0) * e;
    double returned = 0;
    for (int t = 1; t <= 400; ++t) {
      m *= s.beta;
      returned -= s.lr(t) * (nesterov ? s.beta * m : m);
    }
    EXPECT_NEAR(returned, e, 1e-14);
  }
}

// f = L(w − w*)²/2 on a uniform grid, w* between its points, rounded stochastically: the paper's
// bound is sharp.
TEST(Eco, TheStationaryVarianceIsThePapers) {
  const double beta = 0.9, lr = 0.01, curvature = 1, spacing = 1;
  const double k = kappa(Kappa::exact, {beta, beta}, lr, 0);
  std::mt19937_64 bits(7);
  double w = 0, m = 0, of_gradient = 0, of_error = 0;
  constexpr int steps = 400000, warm = 5000;
  for (int t = 0; t < steps; ++t) {
    const double g = curvature * (w - 0.37);
    m = beta * m + (1 - beta) * g;
    const double wide = w - lr * m;
    const double below = std::floor(wide / spacing);
    const double u = static_cast<double>(bits() >> 11) * 0x1p-53;
    w = spacing * (below + (u < wide / spacing - below ? 1 : 0));
    const double e = wide - w;
    m += k * e;
    if (t < warm) continue;
    of_gradient += g * g;
    of_error += e * e;
  }
  const double ratio = of_gradient / (curvature * curvature * of_error);
  EXPECT_NEAR(ratio * (1 - beta * beta), 1, 0.05);
}

// Rounded to nearest and below half a grid step naive training stands still for ever; ECO's
// momentum gathers gradients until a step is taken.
TEST(Eco, AStallEnds) {
  const double beta = 0.9, lr = 0.01, spacing = 0.05, g = 0.2;
  const double k = kappa(Kappa::exact, {beta, beta}, lr, 0);
  double w = 0, m = 0;
  int moved = 0;
  for (int t = 1; moved == 0 && t < 1000; ++t) {
    m = beta * m + (1 - beta) * g;
    EXPECT_NEAR(m, t * (1 - beta) * g, 1e-12) << "M̃ grows by (1 − β)G a step";
    const double wide = w - lr * m;
    const double rounded = std::nearbyint(wide / spacing) * spacing;
    if (rounded != w) moved = t;
    m += k * (wide - rounded);
    w = rounded;
  }
  EXPECT_NEAR(moved, std::ceil(spacing / (2 * lr * (1 - beta) * g)), 1);
}

// ---- P⁻¹ ----------------------------------------------------------------------------------------

/// (XXᵀ)^½ of the short side: UVᵀ·Xᵀ, UVᵀ by the Jacobi SVD.
Matrix root_of(const Matrix& x) {
  const Matrix wide = x.rows <= x.cols ? x : zoo::transposed(x);
  return zoo::product(zoo::svd(wide).map([](double) { return 1.0; }), zoo::transposed(wide));
}

struct Undone {
  Dense<float> direction, correction;
};
/// lmo(X), and P⁻¹E. E empty: of lmo(X) itself.
Undone undo(const LmoConfig& config, const Matrix& x, const Matrix& e = {}) {
  const auto backend = kernels::open_backend("cpu");
  const Lmo lmo(config);
  Undone result{zoo::cast<float>(x), Dense<float>(x.rows, x.cols)};
  std::vector<float> root(lmo.root_bytes(x.rows, x.cols) / sizeof(float) + 64);
  const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(root.data()),
                                   lmo.root_bytes(x.rows, x.cols));
  kernels::DeviceBuffer work(*backend, lmo.root_workspace_bytes(x.rows, x.cols));
  lmo.with_root(result.direction.view(), bytes, work.span(), *backend);
  Dense<float> error = e.data.empty() ? result.direction : zoo::cast<float>(e);
  lmo.undo(bytes, error.view(), result.correction.view(), work.span(), *backend);
  return result;
}

TEST(EcoRoot, UndoesEveryNorm) {
  // P⁻¹lmo(X) = X, whatever the norm; with the LMO's own bits.
  for (const std::string_view norm : norm_names()) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{12, 40}, {40, 12}, {20, 20}}) {
      LmoConfig config;
      config.norm = norm;
      config.coefficients = "polar_express";
      config.iterations = 8;
      const Matrix x = zoo::gaussian(rows, cols, 3);
      const Undone found = undo(config, x);
      Dense<float> direction = zoo::cast<float>(x);
      const auto backend = kernels::open_backend("cpu");
      const Lmo lmo(config);
      kernels::DeviceBuffer work(*backend, lmo.workspace_bytes(rows, cols));
      lmo(direction.view(), work.span(), *backend);
      EXPECT_EQ(found.direction.data, direction.data) << norm;
      // 8 iterations leave σ within 1e-3 on these; the others are exact but for f32.
      EXPECT_LE(zoo::relative_error(found.correction, x), norm == "spectral" ? 4e-3 : 1e-6)
          << norm << " " << rows << "x" << cols;
    }
  }
}

TEST(EcoRoot, TheShortSideKeepsAllOfTheError) {
  // The published form E(XᵀX)^½ deletes what of E lies outside the rows of a wide X.
  for (const char* coefficients : {"rational", "polar_express"}) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{96, 200}, {200, 96}}) {
      LmoConfig config;
      config.coefficients = coefficients;
      config.iterations = 8;
      const Matrix x = zoo::gaussian(rows, cols, 5);
      const Matrix e = zoo::gaussian(rows, cols, 6);
      const Matrix root = root_of(x);
      const Matrix expected = rows <= cols ? zoo::product(root, e) : zoo::product(e, root);
      const Undone found = undo(config, x, e);
      // As far off as lmo(X) is: .042 of three terms, and less of them in the mean.
      EXPECT_LE(zoo::relative_error(found.correction, expected), 0.05) << coefficients;
      // The other side loses a share 1 − m/n of E: not what this does.
      EXPECT_GT(zoo::frobenius(found.correction), 0.9 * zoo::frobenius(expected));
    }
  }
}

TEST(EcoRoot, BothSidesAgreeOnAMultipleOfAnOrthogonalMatrix) {
  const Matrix q = zoo::scaled(zoo::orthonormal_columns(24, 24, 9), 0.3);
  const Matrix e = zoo::gaussian(24, 24, 10);
  LmoConfig config;
  config.coefficients = "polar_express";
  config.iterations = 8;
  // (XXᵀ)^½E = E(XᵀX)^½ = 0.3·E.
  EXPECT_LE(zoo::relative_error(undo(config, q, e).correction, zoo::scaled(e, 0.3)), 2e-3);
}

TEST(EcoRoot, ZeroAndTinyMatrices) {
  const Matrix e = zoo::gaussian(8, 30, 11);
  for (const char* coefficients : {"rational", "polar_express"}) {
    LmoConfig config;
    config.coefficients = coefficients;
    config.iterations = 8;
    const Undone zero = undo(config, Matrix(8, 30), e);
    EXPECT_EQ(zoo::frobenius(zero.correction), 0) << coefficients;
    const Matrix x = zoo::gaussian(8, 30, 12);
    const Undone tiny = undo(config, zoo::scaled(x, 1e-30), e);
    const Undone plain = undo(config, x, e);
    EXPECT_LE(zoo::relative_error(tiny.correction,
                                  zoo::scaled(zoo::cast<double>(plain.correction), 1e-30)),
              1e-4)
        << coefficients;
  }
}

// ---- rules --------------------------------------------------------------------------------------

/// A rule after a few steps, and what it pulls back of an error: C against P⁻¹E in f64.
TEST(EcoRule, PullsBackThroughItsPreconditioner) {
  const auto backend = kernels::open_backend("cpu");
  const Index rows = 3, cols = 40;
  const std::vector<RuleConfig> rules{
      rule("sgd", {{"momentum", 0.9}}),
      rule("adamw", {{"betas", std::vector<double>{0.8, 0.95}}, {"eps", 1e-3}}),
      rule("lion", {{"betas", std::vector<double>{0.8, 0.95}}})};
  for (const RuleConfig& config : rules) {
    const auto made = make_rule(config);
    const auto& r = dynamic_cast<const ElementwiseRule&>(*made);
    std::vector<Dense<float>> states;
    for (std::size_t k = 0; k < r.state().size(); ++k) states.emplace_back(rows, cols);
    std::vector<MatrixView> views;
    for (auto& s : states) views.push_back(s.view());
    Dense<float> w = zoo::cast<float>(zoo::gaussian(rows, cols, 1));
    std::vector<double> work(r.workspace_bytes(rows, cols) / sizeof(double) + 8);
    const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(work.data()),
                                     work.size() * sizeof(double));
    Matrix before, g_last;
    StepScalars s{0, 0.01, 0.1};
    Dense<float> g;
    for (int t = 1; t <= 3; ++t) {
      s.step = t;
      g = zoo::cast<float>(zoo::gaussian(rows, cols, 20 + static_cast<std::uint64_t>(t)));
      before = zoo::cast<double>(states[0]);
      g_last = zoo::cast<double>(g);
      r.update({w.view(), g.view(), views, bytes}, s, *backend);
    }
    Dense<float> e = zoo::cast<float>(zoo::gaussian(rows, cols, 30));
    Dense<float> c(rows, cols);
    const double k = -7.5;
    r.pull_back({e.view(), g.view(), views, bytes}, k, c.view(), s, *backend);
    for (std::size_t i = 0; i < c.data.size(); ++i) {
      double inverse = 1;
      if (config.name == "adamw") {
        const double c1 = 1 - std::pow(0.8, 3), c2 = 1 - std::pow(0.95, 3);
        inverse = c1 * (std::sqrt(states[1].data[i] / c2) + 1e-3);
      } else if (config.name == "lion") {
        inverse = std::abs(0.8 * before.data[i] + 0.2 * g_last.data[i]);
      }
      const double expected = k * inverse * static_cast<double>(e.data[i]);
      // X of Lion is found again from M and G, which differ from it by a few roundings of 1.
      EXPECT_NEAR(c.data[i], expected, 4e-6 * (1 + std::abs(expected))) << config.name;
    }
    EXPECT_TRUE(r.gain().has_value());
  }
  EXPECT_FALSE(make_rule(rule("sgd", {{"momentum", 0.0}}))->gain().has_value());
  EXPECT_EQ(make_rule(rule("lion"))->gain()->first, 0.9);
  EXPECT_EQ(make_rule(rule("lion"))->gain()->decay, 0.99);
}

}  // namespace
}  // namespace orthrus::optim
