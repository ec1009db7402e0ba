// Shampoo, one-sided Shampoo, KL-Shampoo and SOAP against their formulas in f64, written out here
// once more.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <orthrus/error.hpp>

#include "kernels/device_memory.hpp"
#include "kernels/eigh.hpp"
#include "runner.hpp"
#include "support/far_backend.hpp"
#include "support/work.hpp"

namespace orthrus::optim {
namespace {

using testing::HasSubstr;
using zoo::Work;

// ---- algebra in f64 -----------------------------------------------------------------------------

/// f of a symmetric positive semidefinite matrix.
template <class F>
Matrix spectral(const Matrix& p, F f) {
  zoo::Factors factors = zoo::svd(p);
  // Of a semidefinite matrix U and V are equal but where σ is 0, and U has no column there.
  factors.u = factors.v;
  return factors.map(f);
}
Matrix sum(double a, Matrix x, double b, const Matrix& y) {
  for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] = a * x.data[i] + b * y.data[i];
  return x;
}
Matrix gram_of_rows(const Matrix& x) { return zoo::product(x, zoo::transposed(x)); }
Matrix gram_of_columns(const Matrix& x) { return zoo::product(zoo::transposed(x), x); }
Matrix identity(Index m, double scale = 1) {
  Matrix x(m, m);
  for (Index i = 0; i < m; ++i) x(i, i) = scale;
  return x;
}
double trace(const Matrix& p) {
  double t = 0;
  for (Index i = 0; i < p.rows; ++i) t += p(i, i);
  return t;
}
/// What a Gram matrix in f32 is damped by, a share of its norm.
constexpr double kRounding = 0x1p-24;

/// (P + δI)^exponent.
Matrix power(const Matrix& p, double exponent, double absolute, double of_mean) {
  const double delta =
      absolute + of_mean * trace(p) / static_cast<double>(p.rows) + kRounding * zoo::frobenius(p);
  return spectral(p, [=](double x) { return std::pow(x + delta, exponent); });
}

// ---- what is tested -----------------------------------------------------------------------------

/// A rule on one matrix: directions, step by step, of a state that can be looked at.
class Maker {
 public:
  Maker(const RuleConfig& config, Index rows, Index cols, double phase = 0)
      : rule_(make_rule(config)), rows_(rows), cols_(cols), phase_(phase) {
    for (const StateSpec& s : rule_->state())
      states.emplace_back(s.rows(rows, cols), s.cols(rows, cols));
  }

  [[nodiscard]] const MatrixRule& rule() const { return dynamic_cast<const MatrixRule&>(*rule_); }
  [[nodiscard]] const Direction& direction() const { return rule().direction(); }

  /// The step of a gradient.
  Dense<float> operator()(const Matrix& gradient) {
    Dense<float> x = zoo::cast<float>(gradient);
    rule().accumulate({{}, x.view(), views(), {}}, {t + 1, 0, 0}, *backend_);
    return make(x, gradient);
  }
  /// One of any X.
  Dense<float> make(Dense<float> x, const Matrix& gradient) {
    ++t;
    problem.clear();
    Dense<float> g = zoo::cast<float>(gradient);
    Work work(direction().workspace_bytes(lmo_, rows_, cols_));
    direction().make({x.view(), g.view(), views(), phase_, &problem}, lmo_, {t, 0, 0}, work.span(),
                     *backend_);
    EXPECT_TRUE(work.end_untouched());
    return x;
  }
  /// The same, and P⁻¹D.
  std::pair<Dense<float>, Dense<float>> make_and_undo(Dense<float> x, const Matrix& gradient) {
    ++t;
    Dense<float> g = zoo::cast<float>(gradient);
    Work work(direction().root_workspace_bytes(lmo_, rows_, cols_));
    Work root(direction().root_bytes(lmo_, rows_, cols_));
    direction().make_with_root({x.view(), g.view(), views(), phase_, &problem}, lmo_, {t, 0, 0},
                               root.span(), work.span(), *backend_);
    root_ = std::vector<std::byte>(root.span().begin(), root.span().end());
    Dense<float> c = undo(x);
    EXPECT_TRUE(work.end_untouched() && root.end_untouched());
    return {x, c};
  }
  /// P⁻¹E of the last step.
  Dense<float> undo(const Dense<float>& e) {
    Work work(direction().root_workspace_bytes(lmo_, rows_, cols_));
    Work root(root_.size());
    std::copy(root_.begin(), root_.end(), root.span().begin());
    Dense<float> c(rows_, cols_);
    direction().undo(lmo_, {t, 0, 0}, root.span(), views(), e.view(), c.view(), work.span(),
                     *backend_);
    EXPECT_TRUE(work.end_untouched());
    return c;
  }
  /// D of Q from the Gram matrix of 2^-exponent·G; and P⁻¹.
  std::pair<Dense<float>, Dense<float>> gram(const Matrix& x, const Matrix& gradient,
                                             int exponent) {
    ++t;
    const bool wide = rows_ <= cols_;
    const Matrix z = zoo::scaled(gradient, std::ldexp(1.0, -exponent));
    Dense<float> r = zoo::cast<float>(wide ? gram_of_rows(z) : gram_of_columns(z));
    Dense<float> q(r.rows, r.cols);
    Work work(direction().gram_workspace_bytes(lmo_, r.rows, true));
    direction().gram({r.view(), wide, exponent, true, views(), phase_, &problem, q.view(), {}},
                     lmo_, {t, 0, 0}, work.span(), *backend_);
    EXPECT_TRUE(work.end_untouched());
    const Matrix d =
        wide ? zoo::product(zoo::cast<double>(q), x) : zoo::product(x, zoo::cast<double>(q));
    return {zoo::cast<float>(d), r};
  }

  Dense<float>& state(std::string_view name) {
    const auto specs = rule_->state();
    for (std::size_t i = 0; i < specs.size(); ++i) {
      if (specs[i].name == name) return states[i];
    }
    throw std::out_of_range(std::string(name));
  }
  Matrix factor(std::string_view name, Index side) {
    const Dense<float>& packed = state(name);
    Matrix full(side, side);
    for (Index i = 0, k = 0; i < side; ++i) {
      for (Index j = 0; j <= i; ++j, ++k) {
        full(i, j) = full(j, i) = packed.data[static_cast<std::size_t>(k)];
      }
    }
    return full;
  }
  void set_factor(std::string_view name, const Matrix& full) {
    Dense<float>& packed = state(name);
    for (Index i = 0, k = 0; i < full.rows; ++i) {
      for (Index j = 0; j <= i; ++j, ++k) {
        packed.data[static_cast<std::size_t>(k)] = static_cast<float>(full(i, j));
      }
    }
  }

  std::int64_t t = 0;
  std::string problem;
  std::vector<Dense<float>> states;

 private:
  std::vector<MatrixView> views() {
    views_.clear();
    for (auto& s : states) views_.push_back(s.view());
    return views_;
  }

  std::unique_ptr<Rule> rule_;
  Index rows_, cols_;
  double phase_;
  Lmo lmo_{{}};
  std::unique_ptr<kernels::Backend> backend_ = kernels::open_backend("cpu");
  std::vector<std::byte> root_;
  std::vector<MatrixView> views_;
};

constexpr std::pair<Index, Index> kShapes[] = {{6, 15}, {15, 6}, {8, 8}, {1, 5}, {5, 1}};
constexpr std::pair<int, double> kTurns[] = {{1, 0.0}, {3, 0.0}, {3, 0.4}, {3, 0.9}};
const char* const kRules[] = {"shampoo", "one_sided_shampoo", "kl_shampoo", "soap"};

bool due(int t, int frequency, double phase) {
  return t <= frequency || (t + static_cast<int>(phase * frequency)) % frequency == 0;
}
Matrix gradient(Index rows, Index cols, int t, std::uint64_t seed = 0) {
  return zoo::gaussian(rows, cols, 1000 * seed + static_cast<std::uint64_t>(t) + 70);
}

// A factor is rounded to f32 in every step: 6e-8 of its norm, which a Gaussian 8×8 gradient's least
// eigenvalue of 1e-4 of it answers by 6e-4 of that direction's share.
constexpr double kRooted = 5e-4;

// ---- formulas -----------------------------------------------------------------------------------

struct ShampooCase {
  double beta2 = 0.9, eps = 1e-12, exponent = 0;
  bool corrected = true, lifts = false, grafts = false;
};

TEST(Shampoo, IsItsFormula) {
  const ShampooCase cases[] = {{},
                               {1.0},
                               {0.9, 0.1},
                               {0.9, 1e-12, 0.5},
                               {0.9, 1e-12, 0.5, true, true},
                               {0.95, 1e-3, 0, false},
                               {0.9, 1e-12, 0, true, false, true},
                               {0.9, 1e-3, 0, false, false, true}};
  for (const ShampooCase& k : cases) {
    for (const auto& [rows, cols] : kShapes) {
      for (const auto& [frequency, phase] : kTurns) {
        // A root of three gradients knows three directions of a vector; what the next gradient has
        // of the others it lifts by what rounding left there.
        if (std::min(rows, cols) == 1 && frequency > 1 && k.eps < 1e-3) continue;
        const double beta = 0.8, second_beta = 0.7, graft_eps = 1e-3;
        Maker run(rule("shampoo", {{"momentum", beta},
                                   {"beta2", k.beta2},
                                   {"eps", k.eps},
                                   {"exponent", k.exponent},
                                   {"bias_correction", k.corrected},
                                   {"trace_scaling", k.lifts},
                                   {"frequency", static_cast<double>(frequency)},
                                   {"grafting", std::string(k.grafts ? "adam" : "none")},
                                   {"grafting_beta2", second_beta},
                                   {"grafting_eps", graft_eps}}),
                  rows, cols, phase);
        Matrix m(rows, cols), l(rows, rows), r(cols, cols), left, right, v(rows, cols);
        const double e = k.exponent > 0 ? k.exponent : 0.25;
        for (int t = 1; t <= 8; ++t) {
          const Matrix g = gradient(rows, cols, t);
          m = sum(beta, m, 1 - beta, g);
          const double weight = k.beta2 < 1 ? 1 - k.beta2 : 1;
          l = sum(k.beta2, l, weight, gram_of_rows(g));
          r = sum(k.beta2, r, weight, gram_of_columns(g));
          const double c = k.corrected && k.beta2 < 1 ? 1 - std::pow(k.beta2, t) : 1;
          const double c1 = k.corrected ? 1 - std::pow(beta, t) : 1;
          const double c2 = k.corrected ? 1 - std::pow(second_beta, t) : 1;
          if (due(t, frequency, phase)) {
            const auto root = [&](const Matrix& p) {
              return zoo::scaled(power(zoo::scaled(p, 1 / c), -e, k.eps, 0),
                                 k.lifts ? std::pow(trace(p) / c, e / 2) : 1);
            };
            left = root(l);
            right = root(r);
          }
          Matrix d = zoo::scaled(zoo::product(zoo::product(left, m), right), 1 / c1);
          if (k.grafts) {
            double length = 0;
            for (std::size_t i = 0; i < v.data.size(); ++i) {
              v.data[i] = second_beta * v.data[i] + (1 - second_beta) * g.data[i] * g.data[i];
              const double u = m.data[i] / c1 / (std::sqrt(v.data[i] / c2) + graft_eps);
              length += u * u;
            }
            d = zoo::scaled(d, std::sqrt(length) / zoo::frobenius(d));
          }
          // -1/2 on both sides lifts a direction that neither factor knows by the square of what
          // -1/4 does.
          const double bound = k.exponent > 0.25 ? 20 * kRooted : kRooted;
          EXPECT_LE(zoo::relative_error(run(g), d), bound)
              << rows << "x" << cols << " step " << t << " of " << frequency << ", " << phase
              << " beta2 " << k.beta2 << " eps " << k.eps << " exponent " << k.exponent << k.grafts;
          EXPECT_EQ(run.problem, "");
        }
        EXPECT_LE(zoo::relative_error(run.factor("left_factor", rows), l), 1e-6);
        EXPECT_LE(zoo::relative_error(run.factor("right_factor", cols), r), 1e-6);
      }
    }
  }
}

TEST(OneSidedShampoo, IsItsFormula) {
  for (const bool corrected : {false, true}) {
    for (const double beta2 : {0.0, 0.9, 1.0}) {
      for (const auto& [rows, cols] : kShapes) {
        for (const auto& [frequency, phase] : kTurns) {
          const double beta = 0.8, eps = 1e-6;
          Maker run(rule("one_sided_shampoo", {{"momentum", beta},
                                               {"beta2", beta2},
                                               {"eps", eps},
                                               {"bias_correction", corrected},
                                               {"frequency", static_cast<double>(frequency)}}),
                    rows, cols, phase);
          const Index side = std::min(rows, cols);
          Matrix m(rows, cols), l(side, side), root;
          for (int t = 1; t <= 8; ++t) {
            const Matrix g = gradient(rows, cols, t);
            m = sum(beta, m, 1 - beta, g);
            l = sum(beta2, l, beta2 < 1 ? 1 - beta2 : 1,
                    rows <= cols ? gram_of_rows(g) : gram_of_columns(g));
            const double c = beta2 < 1 ? 1 - std::pow(beta2, t) : 1;
            if (due(t, frequency, phase)) root = power(zoo::scaled(l, 1 / c), -0.5, 0, eps);
            const Matrix d =
                zoo::scaled(rows <= cols ? zoo::product(root, m) : zoo::product(m, root),
                            corrected ? 1 / (1 - std::pow(beta, t)) : 1);
            // As before; a square gradient alone (beta2 0) is the worst of them.
            EXPECT_LE(zoo::relative_error(run(g), d), beta2 > 0 ? kRooted : 10 * kRooted)
                << rows << "x" << cols << " step " << t << " of " << frequency << ", " << phase
                << " beta2 " << beta2;
          }
          EXPECT_LE(zoo::relative_error(run.factor("left_factor", side), l), 1e-6);
        }
      }
    }
  }
}

TEST(KlShampoo, IsItsFormula) {
  for (const bool corrected : {false, true}) {
    for (const double eps : {1e-12, 0.3}) {  // 0.3: of the mean eigenvalue
      for (const auto& [rows, cols] : kShapes) {
        for (const auto& [frequency, phase] : kTurns) {
          const double beta = 0.8, beta2 = 0.7;
          Maker run(rule("kl_shampoo", {{"momentum", beta},
                                        {"beta2", beta2},
                                        {"eps", eps},
                                        {"bias_correction", corrected},
                                        {"frequency", static_cast<double>(frequency)}}),
                    rows, cols, phase);
          Matrix m(rows, cols), l, r, left, right;
          for (int t = 1; t <= 8; ++t) {
            const Matrix g = gradient(rows, cols, t);
            if (t == 1) {
              const double mean = zoo::frobenius(g) / std::sqrt(static_cast<double>(rows * cols));
              l = identity(rows, mean);
              r = identity(cols, mean);
              left = identity(rows, 1 / std::sqrt(mean));
              right = identity(cols, 1 / std::sqrt(mean));
            }
            m = sum(beta, m, 1 - beta, g);
            const Matrix by_right = zoo::product(g, right);
            const Matrix by_left = zoo::product(left, g);
            l = sum(beta2, l, (1 - beta2) / static_cast<double>(cols), gram_of_rows(by_right));
            r = sum(beta2, r, (1 - beta2) / static_cast<double>(rows), gram_of_columns(by_left));
            if (due(t, frequency, phase)) {
              const auto root = [&](const Matrix& p) {
                const double least = eps + kRounding * zoo::frobenius(p);
                return spectral(p, [=](double x) { return 1 / std::sqrt(std::max(x, least)); });
              };
              left = root(l);
              right = root(r);
            }
            const Matrix d = zoo::scaled(zoo::product(zoo::product(left, m), right),
                                         corrected ? 1 / (1 - std::pow(beta, t)) : 1);
            // Each step goes through both roots of the one before.
            EXPECT_LE(zoo::relative_error(run(g), d), 4 * kRooted)
                << rows << "x" << cols << " step " << t << " of " << frequency << ", " << phase;
          }
          EXPECT_LE(zoo::relative_error(run.factor("left_factor", rows), l), 1e-3);
          EXPECT_LE(zoo::relative_error(run.factor("right_factor", cols), r), 1e-3);
        }
      }
    }
  }
}

/// Orthonormal columns that span what those of x do, one after the other.
Matrix gram_schmidt(Matrix x) {
  for (int pass = 0; pass < 2; ++pass) {
    for (Index j = 0; j < x.cols; ++j) {
      for (Index k = 0; k < j; ++k) {
        double dot = 0;
        for (Index i = 0; i < x.rows; ++i) dot += x(i, j) * x(i, k);
        for (Index i = 0; i < x.rows; ++i) x(i, j) -= dot * x(i, k);
      }
      double norm = 0;
      for (Index i = 0; i < x.rows; ++i) norm += x(i, j) * x(i, j);
      for (Index i = 0; i < x.rows; ++i) x(i, j) /= std::sqrt(norm);
    }
  }
  return x;
}

/// One side's basis in f64: columns, and where each was before.
struct Basis {
  Matrix q;
  std::vector<Index> order;

  void renew(const Matrix& factor) {
    order.resize(static_cast<std::size_t>(factor.rows));
    std::iota(order.begin(), order.end(), Index{0});
    if (q.rows == 0) {
      q = zoo::svd(factor).v;
      return;
    }
    const Matrix lq = zoo::product(factor, q);
    std::vector<double> value(order.size());
    for (Index j = 0; j < q.cols; ++j) {
      for (Index i = 0; i < q.rows; ++i) value[static_cast<std::size_t>(j)] += lq(i, j) * q(i, j);
    }
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
      return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
    });
    Matrix sorted(q.rows, q.cols);
    for (Index j = 0; j < q.cols; ++j) {
      for (Index i = 0; i < q.rows; ++i) sorted(i, j) = lq(i, order[static_cast<std::size_t>(j)]);
    }
    q = gram_schmidt(sorted);
  }
};

TEST(Soap, IsItsFormula) {
  // Square: of a long side's null space any basis will do, and another one is another Adam.
  for (const Index side : {Index{1}, Index{4}, Index{7}}) {
    for (const auto& [frequency, phase] : kTurns) {
      const double b1 = 0.8, b2 = 0.9, beta = 0.85, eps = 1e-3;
      Maker run(rule("soap", {{"betas", std::vector<double>{b1, b2}},
                              {"shampoo_beta", beta},
                              {"eps", eps},
                              {"frequency", static_cast<double>(frequency)}}),
                side, side, phase);
      Matrix m(side, side), l(side, side), r(side, side), v(side, side);
      Basis left, right;
      for (int t = 1; t <= 9; ++t) {
        const Matrix g = gradient(side, side, t, 3);
        m = sum(b1, m, 1 - b1, g);
        l = sum(beta, l, 1 - beta, gram_of_rows(g));
        r = sum(beta, r, 1 - beta, gram_of_columns(g));
        if (due(t, frequency, phase)) {
          left.renew(l);
          right.renew(r);
          const Matrix old = v;
          for (Index i = 0; i < side; ++i) {
            for (Index j = 0; j < side; ++j) {
              v(i, j) = old(left.order[static_cast<std::size_t>(i)],
                            right.order[static_cast<std::size_t>(j)]);
            }
          }
        }
        const auto turned = [&](const Matrix& x) {
          return zoo::product(zoo::product(zoo::transposed(left.q), x), right.q);
        };
        const Matrix gq = turned(g);
        Matrix u = turned(m);
        for (std::size_t i = 0; i < v.data.size(); ++i) {
          v.data[i] = b2 * v.data[i] + (1 - b2) * gq.data[i] * gq.data[i];
          u.data[i] = u.data[i] / (1 - std::pow(b1, t)) /
                      (std::sqrt(v.data[i] / (1 - std::pow(b2, t))) + eps);
        }
        const Matrix d = zoo::product(zoo::product(left.q, u), zoo::transposed(right.q));
        // Bases are of f32 factors, kept in f32: 6e-8 over the distance of two eigenvalues; and the
        // shift of the iteration, 1e-6. In the basis entries are divided by numbers down to eps.
        EXPECT_LE(zoo::relative_error(run(g), d), 2e-3)
            << side << " step " << t << " of " << frequency << ", " << phase;
      }
    }
  }
}

// ---- T10.1 to T10.4 -----------------------------------------------------------------------------

TEST(Kronecker, WithoutAccumulationTheyAreMsign) {  // T10.1
  for (const auto& [rows, cols] : kShapes) {
    const Matrix g = zoo::condition(rows, cols, 10, 5);
    const Matrix sign = zoo::msign_oracle(g);
    const std::map<std::string, Value> none{{"momentum", 0.0}, {"beta2", 0.0}};
    // λ ≥ 0.01 are known to 1e-5.
    EXPECT_LE(zoo::relative_error(Maker(rule("shampoo", none), rows, cols)(g), sign), 1e-4) << rows;
    EXPECT_LE(zoo::relative_error(Maker(rule("one_sided_shampoo", none), rows, cols)(g), sign),
              1e-4)
        << rows;
    // In the basis G is diagonal but for rounding in f32, 1e-7 here, which Adam would lift to 1:
    // eps lies between that and σ ≥ 0.1, whose entries it makes 1 - eps/σ.
    Maker soap(rule("soap", {{"betas", std::vector<double>{0, 0}},
                             {"shampoo_beta", 0.0},
                             {"eps", 1e-4},
                             {"frequency", 1.0}}),
               rows, cols);
    EXPECT_LE(zoo::relative_error(soap(g), sign), 3e-3) << rows;
  }
}

TEST(Soap, WithoutBasesIsAdamBitForBit) {  // T10.2
  for (const auto& [rows, cols] : {std::pair<Index, Index>{5, 7}, {7, 5}}) {
    const Matrix w = zoo::gaussian(rows, cols, 1);
    LmoConfig unscaled;
    unscaled.scale = "spectral";
    const std::map<std::string, Value> values{
        {"lr", 0.01}, {"weight_decay", 0.1}, {"betas", std::vector<double>{0.8, 0.9}}};
    Runner adam(rule("adamw", values), w);
    auto with_sides = values;
    with_sides["max_dimension"] = 4.0;
    Runner soap(rule("soap", with_sides), w, unscaled);
    for (int t = 1; t <= 20; ++t) {
      adam.step(gradient(rows, cols, t));
      soap.step(gradient(rows, cols, t));
    }
    EXPECT_LE(zoo::relative_error(soap.weights, adam.weights), 1e-6);  // f32
  }
}

TEST(Soap, OfDiagonalFactorsIsAdam) {  // T10.2: eigenvectors are the axes
  Maker soap(rule("soap", {{"betas", std::vector<double>{0.8, 0.9}}, {"frequency", 2.0}}), 4, 6);
  Matrix m(4, 6), v(4, 6);
  for (int t = 1; t <= 8; ++t) {
    Matrix g(4, 6);
    for (Index i = 0; i < 4; ++i)
      g(i, i + 1) = gradient(4, 6, t)(i, i) * static_cast<double>(i + 1);
    Matrix d(4, 6);
    for (std::size_t i = 0; i < d.data.size(); ++i) {
      m.data[i] = 0.8 * m.data[i] + 0.2 * g.data[i];
      v.data[i] = 0.9 * v.data[i] + 0.1 * g.data[i] * g.data[i];
      d.data[i] = m.data[i] / (1 - std::pow(0.8, t)) /
                  (std::sqrt(v.data[i] / (1 - std::pow(0.9, t))) + 1e-8);
    }
    EXPECT_LE(zoo::relative_error(soap(g), d), 1e-4) << t;  // f32
  }
}

TEST(Kronecker, TurnWithTheirGradients) {  // T10.3: G → AGB gives D → ADB
  for (const std::string name : kRules) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 10}, {10, 6}, {7, 7}}) {
      // Of a null space any basis will do: SOAP turns with its gradients where there is none.
      if (name == "soap" && rows != cols) continue;
      for (const double frequency : {1.0, 3.0}) {
        RuleConfig config = rule(name, {{"frequency", frequency}});
        if (name == "soap") config.values["eps"] = 1e-3;
        Maker plain(config, rows, cols);
        Maker turned(config, rows, cols);
        const Matrix a = zoo::orthonormal_columns(rows, rows, 1);
        const Matrix b = zoo::orthonormal_columns(cols, cols, 2);
        for (int t = 1; t <= 6; ++t) {
          const Matrix g = gradient(rows, cols, t, 9);
          const auto turn = [&](const Matrix& x) { return zoo::product(zoo::product(a, x), b); };
          const Matrix d = turn(zoo::cast<double>(plain(g)));
          // Two runs in f32, each as far from the formula as above.
          EXPECT_LE(zoo::relative_error(turned(turn(g)), d), name == "soap" ? 4e-3 : 2 * kRooted)
              << name << rows << " step " << t;
        }
      }
    }
  }
}

TEST(KlShampoo, ScalesItsFactorsAndNotItsDirection) {  // T10.4
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 10}, {10, 6}, {7, 7}}) {
    for (const double c : {1e-3, 3.0, 1e3}) {
      Maker one(rule("kl_shampoo"), rows, cols);
      Maker other(rule("kl_shampoo"), rows, cols);
      for (int t = 1; t <= 30; ++t) {
        const Matrix g = gradient(rows, cols, t);
        EXPECT_LE(zoo::relative_error(other(zoo::scaled(g, c)), one(g)), 2 * kRooted) << c << t;
      }
      const double product =
          zoo::frobenius(other.state("left_factor")) / zoo::frobenius(one.state("left_factor")) *
          zoo::frobenius(other.state("right_factor")) / zoo::frobenius(one.state("right_factor"));
      EXPECT_NEAR(product / (c * c), 1, 1e-3);
    }
  }
}

TEST(KlShampoo, RestsWhereEachFactorIsTheGradientWhitenedByTheOther) {
  // One gradient for ever: at rest L = GR⁻¹Gᵀ/n, so D = L^-½GR^-½ has DDᵀ = nI.
  const Index side = 6;
  const Matrix g = zoo::condition(side, side, 5, 3);
  Maker run(rule("kl_shampoo", {{"momentum", 0.0}, {"frequency", 1.0}, {"beta2", 0.8}}), side,
            side);
  Dense<float> d;
  for (int t = 1; t <= 200; ++t) d = run(g);
  const Matrix l = run.factor("left_factor", side);
  const Matrix inverse = spectral(run.factor("right_factor", side), [](double x) { return 1 / x; });
  const Matrix whitened = zoo::scaled(zoo::product(zoo::product(g, inverse), zoo::transposed(g)),
                                      1 / static_cast<double>(side));
  EXPECT_LE(zoo::relative_error(l, whitened), 1e-4);  // 0.8^200, and f32
  for (const double sigma : zoo::singular_values(d)) {
    EXPECT_NEAR(sigma / std::sqrt(static_cast<double>(side)), 1, 1e-4);
  }
}

TEST(KlShampoo, BeginsAsLargeAsItsFirstGradientSays) {
  for (const double c : {1e-30, 1e-6, 1.0, 1e6, 1e30}) {
    Maker run(rule("kl_shampoo", {{"momentum", 0.0}, {"eps", 0.0}}), 6, 15);
    // Whitened entries are near 1, from the first step on.
    const double rms = zoo::frobenius(run(zoo::scaled(gradient(6, 15, 1), c))) / std::sqrt(90.0);
    EXPECT_NEAR(rms, 1, 0.2) << c;
  }
}

// ---- turns --------------------------------------------------------------------------------------

TEST(Kronecker, RootsAreRenewedInTurns) {
  for (const std::string name : kRules) {
    for (const double phase : {0.0, 0.3, 0.6, 0.9}) {
      Maker run(rule(name, {{"frequency", 5.0}}), 4, 4, phase);
      const std::string_view made = name == "soap" ? "left_vectors" : "left_root";
      for (int t = 1; t <= 20; ++t) {
        const Dense<float> before = run.state(made);
        run(gradient(4, 4, t));
        EXPECT_EQ(!zoo::same_bits(before, run.state(made)), due(t, 5, phase)) << name << t << phase;
      }
    }
  }
}

TEST(Kronecker, FirstStepsAreNoLongerThanLaterOnes) {
  // A root of the first gradient alone would lift what the second one has beyond its rows a
  // hundredfold.
  for (const std::string name : {"shampoo", "kl_shampoo"}) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{4, 20}, {20, 4}}) {
      Maker run(rule(name), rows, cols);
      double most = 0;
      for (int t = 1; t <= 10; ++t)
        most = std::max(most, zoo::frobenius(run(gradient(rows, cols, t))));
      const double later = zoo::frobenius(run(gradient(rows, cols, 11)));
      EXPECT_LE(most, 8 * later) << name;
    }
  }
}

// ---- failures -----------------------------------------------------------------------------------

Matrix indefinite(Index side) {
  Matrix p = identity(side, 2);
  p(0, 0) = -1;
  return p;
}

TEST(Shampoo, LiftsNegativeEigenvaluesToZero) {
  const double eps = 0.1;
  Maker run(rule("shampoo", {{"beta2", 1.0}, {"momentum", 0.0}, {"eps", eps}}), 5, 5);
  run.set_factor("left_factor", indefinite(5));
  run.set_factor("right_factor", identity(5));
  const Matrix x = zoo::gaussian(5, 5, 1);
  const Dense<float> d = run.make(zoo::cast<float>(x), zoo::zero(5, 5));
  Matrix expected = x;
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 5; ++j) {
      expected(i, j) *= std::pow(i == 0 ? eps : 3 + eps, -0.25) * std::pow(1 + eps, -0.25);
    }
  }
  EXPECT_LE(zoo::relative_error(d, expected), 1e-5);
  EXPECT_EQ(run.problem, "");
}

TEST(Kronecker, ARootThatFailsIsReplacedByTheOneBeforeSoManyTimes) {
  for (const std::string name : {"shampoo", "one_sided_shampoo"}) {
    for (const double tolerated : {0.0, 2.0}) {
      Maker run(rule(name, {{"beta2", 1.0},
                            {"momentum", 0.0},
                            {"root", std::string("coupled")},
                            {"frequency", 1.0},
                            {"bias_correction", false},
                            {"tolerated_failures", tolerated}}),
                5, 5);
      const Matrix x = zoo::gaussian(5, 5, 1);
      const Dense<float> d = run.make(zoo::cast<float>(x), x);
      const Dense<float> root = run.state("left_root");
      const Matrix factor = run.factor("left_factor", 5);
      for (const bool again : {false, true}) {
        run.set_factor("left_factor", indefinite(5));  // products have no root of it
        for (int k = 1; k <= tolerated; ++k) {
          const Dense<float> old = run.make(zoo::cast<float>(x), zoo::zero(5, 5));
          EXPECT_LE(zoo::relative_error(old, d), 1e-6) << name;
          EXPECT_TRUE(zoo::same_bits(run.state("left_root"), root));
          EXPECT_THAT(run.problem, HasSubstr("factor of its rows: P, with norm"));
          EXPECT_THAT(run.problem, HasSubstr(std::to_string(k) + " of 2 tolerated"));
          EXPECT_EQ(run.state("root_failures").data[0], static_cast<float>(k));
        }
        if (again) {
          const auto once_more = [&] { run.make(zoo::cast<float>(x), zoo::zero(5, 5)); };
          try {
            once_more();
            ADD_FAILURE() << "a root served too often";
          } catch (const NumericError& e) {
            EXPECT_THAT(e.what(), HasSubstr("rule.tolerated_failures"));
            EXPECT_THAT(e.what(), HasSubstr("factor of its rows"));
          }
        } else {
          run.set_factor("left_factor", factor);  // and they begin to count anew
          run.make(zoo::cast<float>(x), zoo::zero(5, 5));
          EXPECT_EQ(run.problem, "");
          EXPECT_EQ(run.state("root_failures").data[0], 0.0F);
        }
      }
    }
  }
}

TEST(Kronecker, NoRootAtAllIsAnError) {
  Maker run(rule("shampoo", {{"root", std::string("coupled")}, {"beta2", 1.0}}), 5, 5);
  run.set_factor("right_factor", indefinite(5));
  const Matrix x = zoo::scaled(zoo::gaussian(5, 5, 1), 1e-3);
  try {
    run.make(zoo::cast<float>(x), x);
    ADD_FAILURE() << "made of no root";
  } catch (const NumericError& e) {
    EXPECT_THAT(e.what(), HasSubstr("factor of its columns"));
    EXPECT_THAT(e.what(), HasSubstr("none from before"));
  }
}

TEST(Kronecker, AGradientThatIsNotFiniteDoesNotStay) {
  for (const std::string name : kRules) {
    for (const double bad :
         {std::nan(""), std::numeric_limits<double>::infinity(), 1e30}) {  // whose squares are not
      RuleConfig config = rule(name, {{"frequency", 2.0}});
      if (name == "shampoo") config.values["grafting"] = std::string("adam");
      Maker run(config, 4, 6), clean(config, 4, 6);
      for (int t = 1; t <= 3; ++t) {
        const Matrix g = gradient(4, 6, t);
        run(g);
        clean(g);
      }
      const std::vector<Dense<float>> before = run.states;
      Matrix spoiled = gradient(4, 6, 4);
      spoiled(1, 2) = bad;
      // X is not what this is about.
      run.make(zoo::cast<float>(gradient(4, 6, 5)), spoiled);
      EXPECT_THAT(run.problem, HasSubstr("not be finite")) << name;
      const auto specs = run.rule().state();
      for (std::size_t k = 0; k < specs.size(); ++k) {
        for (const float v : run.states[k].data) EXPECT_TRUE(std::isfinite(v)) << specs[k].name;
        const bool moment = specs[k].name == "second_moment" ||
                            specs[k].name.find("factor") != std::string_view::npos;
        if (moment && name != "soap") {
          EXPECT_TRUE(zoo::same_bits(run.states[k], before[k])) << name << specs[k].name;
        }
      }
      const Dense<float> d = run(gradient(4, 6, 6));
      EXPECT_TRUE(std::isfinite(zoo::frobenius(d))) << name;
      run(gradient(4, 6, 7));
      EXPECT_EQ(run.problem, "");
      EXPECT_EQ(run.state("root_failures").data[0], 0.0F);

      if (name == "soap") {  // with no basis on either side, too
        config.values["max_dimension"] = 2.0;
        Maker plain(config, 4, 6);
        plain(gradient(4, 6, 1));
        plain.make(zoo::cast<float>(gradient(4, 6, 5)), spoiled);
        EXPECT_THAT(plain.problem, HasSubstr("not be finite"));
        for (const float v : plain.state("second_moment").data) EXPECT_TRUE(std::isfinite(v));
        config.values.erase("max_dimension");
      }
      Maker fresh(config, 4, 6);
      // KL-Shampoo begins with factors as large as the gradient: 1e30 is nothing to it.
      if (name == "kl_shampoo" && bad == 1e30) continue;
      EXPECT_THROW(fresh(spoiled), NumericError) << name;
    }
  }
}

TEST(Kronecker, AStateThatIsNotFiniteIsAnErrorAtLast) {
  for (const std::string name : kRules) {
    Maker run(rule(name, {{"tolerated_failures", 2.0}}), 4, 6);
    run(gradient(4, 6, 1));
    run.state("left_factor").data[0] = std::numeric_limits<float>::quiet_NaN();
    run(gradient(4, 6, 2));
    run(gradient(4, 6, 3));
    EXPECT_THROW(run(gradient(4, 6, 4)), NumericError) << name;
  }
}

TEST(Kronecker, NoGradientIsNoStep) {
  for (const std::string name : kRules) {
    Maker run(rule(name), 4, 6);
    for (int t = 1; t <= 3; ++t) {
      EXPECT_EQ(zoo::frobenius(run(zoo::zero(4, 6))), 0) << name;
      EXPECT_EQ(run.problem, "");
    }
    for (int t = 4; t <= 14; ++t) {
      const double length = zoo::frobenius(run(gradient(4, 6, t)));
      EXPECT_TRUE(std::isfinite(length) && length > 0) << name << t;
    }
  }
}

// ---- products in place of eigenvectors ----------------------------------------------------------

TEST(Kronecker, RootsByProductsAreThoseByEigenvectors) {
  for (const std::string name : {"shampoo", "one_sided_shampoo"}) {
    for (const double exponent : {0.25, 0.5}) {
      RuleConfig config = rule(name, {{"eps", 1e-2}, {"frequency", 2.0}});
      if (name == "shampoo") config.values["exponent"] = exponent;
      config.values["root"] = std::string("eigh");
      Maker eigh(config, 6, 9);
      config.values["root"] = std::string("coupled");
      Maker coupled(config, 6, 9);
      for (int t = 1; t <= 6; ++t) {
        const Matrix g = gradient(6, 9, t);
        EXPECT_LE(zoo::relative_error(coupled(g), eigh(g)), 1e-4) << name << t;
      }
    }
  }
  EXPECT_THROW(
      (void)make_rule(rule("shampoo", {{"root", std::string("coupled")}, {"exponent", 0.3}})),
      ConfigError);
  EXPECT_THROW((void)make_rule(rule("shampoo", {{"frequency", 1.5}})), ConfigError);
}

// ---- ECO ----------------------------------------------------------------------------------------

RuleConfig variant(const std::string& name, bool grafts) {
  RuleConfig config = rule(name, {{"frequency", 3.0}});
  if (name == "soap") config.values["eps"] = 1e-3;
  if (name == "shampoo") config.values["eps"] = 1e-6;
  if (grafts) config.values["grafting"] = std::string("adam");
  return config;
}

TEST(Kronecker, EcoFindsTheXThatADirectionIsOf) {  // P⁻¹PX = X of any X
  for (const auto& [rows, cols] : kShapes) {
    for (const std::string name : kRules) {
      for (const bool grafts : {false, true}) {
        if (grafts && name != "shampoo") continue;
        Maker run(variant(name, grafts), rows, cols);
        Maker same(variant(name, grafts), rows, cols);
        for (int t = 1; t <= 7; ++t) {  // old roots in some of them
          const Matrix g = gradient(rows, cols, t);
          const Dense<float> x = zoo::cast<float>(gradient(rows, cols, t, 8));
          const auto [d, back] = run.make_and_undo(x, g);
          EXPECT_TRUE(zoo::same_bits(d, same.make(x, g)));
          // Two f32 roots and their inverses: 6e-8 of the largest eigenvalue of a root, which the
          // least one answers by the ratio of both, below 1e3 here.
          EXPECT_LE(zoo::relative_error(back, x), 1e-3)
              << name << rows << "x" << cols << " step " << t << grafts;
        }
        EXPECT_EQ(run.direction().is_linear(), !grafts) << name;
      }
    }
  }
}

TEST(Kronecker, EcoAppliesRootsOfTheFactorsToAnyResidual) {
  const Index rows = 6, cols = 6;
  const double beta = 0.8, beta2 = 0.9;
  const Dense<float> e = zoo::cast<float>(zoo::gaussian(rows, cols, 9));
  Matrix l(rows, rows), r(cols, cols);
  Maker two(rule("shampoo", {{"momentum", beta}, {"beta2", beta2}, {"frequency", 1.0}}), rows,
            cols);
  Maker one(rule("one_sided_shampoo", {{"beta2", beta2}, {"frequency", 1.0}}), rows, cols);
  for (int t = 1; t <= 4; ++t) {
    const Matrix g = gradient(rows, cols, t);
    l = sum(beta2, l, 1 - beta2, gram_of_rows(g));
    r = sum(beta2, r, 1 - beta2, gram_of_columns(g));
    two.make_and_undo(e, g);
    one.make_and_undo(e, g);
  }
  const double c = 1 - std::pow(beta2, 4);
  const auto root = [&](const Matrix& p, double exponent, double eps, double of_mean) {
    return power(zoo::scaled(p, 1 / c), exponent, eps, of_mean);
  };
  const Matrix wide = zoo::cast<double>(e);
  const Matrix both = zoo::scaled(
      zoo::product(zoo::product(root(l, 0.25, 1e-12, 0), wide), root(r, 0.25, 1e-12, 0)),
      1 - std::pow(beta, 4));
  EXPECT_LE(zoo::relative_error(two.undo(e), both), 1e-4);
  EXPECT_LE(zoo::relative_error(one.undo(e), zoo::product(root(l, 0.5, 0, 1e-8), wide)), 1e-4);
}

TEST(Kronecker, AreLinearInTheMomentumWhereTheySaySo) {
  for (const std::string name : kRules) {
    for (const bool grafts : {false, true}) {
      if (grafts && name != "shampoo") continue;
      const auto made = [&](const Matrix& x) {
        Maker run(variant(name, grafts), 5, 8);
        run(gradient(5, 8, 1));
        return run.make(zoo::cast<float>(x), gradient(5, 8, 2));
      };
      const Matrix x = zoo::gaussian(5, 8, 31);
      const Matrix y = zoo::gaussian(5, 8, 32);
      const Matrix apart = sum(1, zoo::cast<double>(made(x)), 3, zoo::cast<double>(made(y)));
      const double error = zoo::relative_error(made(sum(1, x, 3, y)), apart);
      if (grafts) {
        EXPECT_GE(error, 0.01);
      } else {
        EXPECT_LE(error, 1e-5) << name;  // f32
      }
    }
  }
}

// ---- a device -----------------------------------------------------------------------------------

/// A matrix in a device's memory.
class Far {
 public:
  Far(kernels::Backend& backend, const Dense<float>& x)
      : backend_(backend),
        rows_(x.rows),
        cols_(x.cols),
        memory_(backend, std::max<std::size_t>(x.data.size(), 1) * sizeof(float)) {
    backend.copy(x.data.data(), memory_.data(), x.data.size() * sizeof(float));
    backend.wait();
  }
  [[nodiscard]] MatrixView view() const {
    return matrix_view(static_cast<float*>(memory_.data()), rows_, cols_);
  }
  [[nodiscard]] Dense<float> read() const {
    Dense<float> x(rows_, cols_);
    backend_.copy(memory_.data(), x.data.data(), x.data.size() * sizeof(float));
    backend_.wait();
    return x;
  }

 private:
  kernels::Backend& backend_;
  Index rows_, cols_;
  kernels::DeviceBuffer memory_;
};

TEST(Kronecker, NeedNotFollowADevicesPointers) {
  const Index rows = 6, cols = 9;
  for (const std::string name : kRules) {
    for (const bool grafts : {false, true}) {
      if (grafts && name != "shampoo") continue;
      RuleConfig config = variant(name, grafts);
      // A device takes products, which add 1e-6 of the norm: less than 1e-4 of these.
      if (name == "shampoo") config.values["eps"] = 1.0;
      if (name == "one_sided_shampoo") config.values["eps"] = 1e-2;
      Maker near(config, rows, cols);
      far_device::FarBackend device;
      const Direction& direction = near.direction();
      const Lmo lmo{{}};
      std::vector<Far> states;
      for (const Dense<float>& s : near.states) states.emplace_back(device, s);
      std::vector<MatrixView> views;
      for (const Far& s : states) views.push_back(s.view());
      const kernels::DeviceBuffer work(device, direction.root_workspace_bytes(lmo, rows, cols));
      const kernels::DeviceBuffer root(
          device, std::max<std::size_t>(direction.root_bytes(lmo, rows, cols), 1));
      for (int t = 1; t <= 7; ++t) {
        const Matrix g = gradient(rows, cols, t);
        const Dense<float> x = zoo::cast<float>(gradient(rows, cols, t, 8));
        const auto [d, back] = near.make_and_undo(x, g);
        const Far far_x(device, x);
        const Far far_g(device, zoo::cast<float>(g));
        const Far far_c(device, Dense<float>(rows, cols));
        direction.make_with_root({far_x.view(), far_g.view(), views}, lmo, {t, 0, 0}, root.span(),
                                 work.span(), device);
        direction.undo(lmo, {t, 0, 0}, root.span(), views, far_x.view(), far_c.view(), work.span(),
                       device);
        EXPECT_LE(zoo::relative_error(far_x.read(), d), 1e-4) << name << t;
        EXPECT_LE(zoo::relative_error(far_c.read(), x), 1e-3) << name << t;
      }
    }
  }
}

// ---- mode gram ----------------------------------------------------------------------------------

TEST(OneSidedShampoo, IsTheSameFromAGramMatrix) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{6, 15}, {15, 6}, {7, 7}}) {
    for (const int exponent : {0, 5, -40}) {
      Maker whole(rule("one_sided_shampoo", {{"frequency", 2.0}, {"bias_correction", true}}), rows,
                  cols);
      Maker gram(rule("one_sided_shampoo", {{"frequency", 2.0}, {"bias_correction", true}}), rows,
                 cols);
      for (int t = 1; t <= 5; ++t) {
        const Matrix g = zoo::scaled(gradient(rows, cols, t), std::ldexp(1.0, exponent));
        const Matrix x = gradient(rows, cols, t, 7);
        const auto [d, root] = gram.gram(x, g, exponent);
        const Dense<float> expected = whole.make(zoo::cast<float>(x), g);
        EXPECT_LE(zoo::relative_error(d, expected), 1e-4) << rows << " " << exponent << " " << t;
        EXPECT_LE(zoo::relative_error(gram.state("left_factor"), whole.state("left_factor")), 1e-6);
        const Matrix inverse = zoo::cast<double>(root);
        const Matrix back = rows <= cols ? zoo::product(inverse, zoo::cast<double>(d))
                                         : zoo::product(zoo::cast<double>(d), inverse);
        EXPECT_LE(zoo::relative_error(back, x), 1e-3) << rows;  // as `EcoFindsTheX…`
      }
    }
  }
}

TEST(Kronecker, SaysWhichModesItsFactorsAllow) {
  for (const std::string name : kRules) {
    Maker run(rule(name), 6, 15);
    for (const Mode mode : {Mode::owner, Mode::exchange, Mode::gather}) {
      EXPECT_EQ(run.direction().obstacle(mode, 6, 15, true, true), "") << name;
    }
    const bool one_sided = name == "one_sided_shampoo";
    for (const Mode mode :
         {Mode::gram_steps, Mode::block_cyclic, Mode::block_local, Mode::periodic}) {
      if (one_sided && mode == Mode::block_cyclic) continue;
      EXPECT_THAT(run.direction().obstacle(mode, 6, 15, true, false), HasSubstr("owner, exchange"))
          << name;
    }
    EXPECT_EQ(run.direction().obstacle(Mode::block_cyclic, 6, 15, false, false).empty(), one_sided);
    EXPECT_EQ(run.direction().obstacle(Mode::gram, 6, 15, true, true).empty(), one_sided) << name;
    EXPECT_NE(run.direction().obstacle(Mode::gram, 6, 15, false, true), "") << name;
    EXPECT_NE(run.direction().obstacle(Mode::gram, 15, 6, true, true), "") << name;
    EXPECT_TRUE(run.direction().asks_for_gradient());
  }
}

TEST(Kronecker, TakeNoSideThatLapackCannotCount) {
  const Index most = kernels::largest_eigh_side;
  const auto why = [&](const RuleConfig& config, Index rows, Index cols) {
    return Maker(config, 2, 2).direction().obstacle(Mode::exchange, rows, cols, true, false);
  };
  for (const char* name : {"shampoo", "kl_shampoo"}) {
    EXPECT_EQ(why(rule(name), 64, most), "") << name;
    EXPECT_THAT(why(rule(name), 64, most + 1), HasSubstr("32001 rows")) << name;
    EXPECT_THAT(why(rule(name), most + 1, 64), HasSubstr("32001 rows")) << name;
  }
  EXPECT_EQ(why(rule("one_sided_shampoo"), most + 1, most), "");
  EXPECT_THAT(why(rule("one_sided_shampoo"), most + 1, most + 1), HasSubstr("rule.root coupled"));
  for (const char* name : {"shampoo", "one_sided_shampoo"}) {
    EXPECT_EQ(why(rule(name, {{"root", std::string("coupled")}}), most + 1, most + 1), "") << name;
  }
  EXPECT_EQ(why(rule("soap"), most + 1, most + 1), "") << "such a side keeps its own basis";
}

TEST(Kronecker, TakeNoFractionsWhereTheyCount) {
  for (const char* key : {"frequency", "tolerated_failures", "block"}) {
    EXPECT_THROW(make_rule(rule("shampoo", {{key, 1.5}})), ConfigError) << key;
    EXPECT_NO_THROW(make_rule(rule("shampoo", {{key, 2.0}}))) << key;
  }
  EXPECT_THROW(make_rule(rule("soap", {{"max_dimension", 1.5}})), ConfigError);
}

// ---- state and costs ----------------------------------------------------------------------------

Index numbers(const RuleConfig& config, Index rows, Index cols) {
  Index total = 0;
  for (const auto made = make_rule(config); const StateSpec& s : made->state()) {
    total += s.rows(rows, cols) * s.cols(rows, cols);
  }
  return total;
}

TEST(Kronecker, KeepsNoMoreThanItSays) {
  const auto triangle = [](Index m) { return m * (m + 1) / 2; };
  for (const auto& [m, n] : {std::pair<Index, Index>{6, 15}, {15, 6}}) {
    const Index both = 2 * (triangle(m) + triangle(n)) + m * n + 1;
    EXPECT_EQ(numbers(rule("shampoo"), m, n), both);
    EXPECT_EQ(numbers(rule("shampoo", {{"grafting", std::string("adam")}}), m, n), both + m * n);
    EXPECT_EQ(numbers(rule("kl_shampoo"), m, n), both);
    EXPECT_EQ(numbers(rule("one_sided_shampoo"), m, n), 2 * triangle(6) + m * n + 1);
    EXPECT_EQ(numbers(rule("soap"), m, n),
              triangle(m) + triangle(n) + m * m + n * n + 2 * m * n + 1);
    // A side of 15 is above the limit.
    EXPECT_EQ(numbers(rule("soap", {{"max_dimension", 14.0}}), m, n),
              triangle(6) + 36 + 2 * m * n + 1);
  }
}

TEST(Soap, WithOneBasisTurnsOnThatSideOnly) {
  // The eigenvectors of GGᵀ, and Adam's own columns: the same under a turn of the rows.
  const RuleConfig config = rule("soap", {{"max_dimension", 8.0}, {"eps", 1e-3}});
  Maker plain(config, 5, 12), turned(config, 5, 12);
  const Matrix a = zoo::orthonormal_columns(5, 5, 1);
  for (int t = 1; t <= 4; ++t) {
    const Matrix g = gradient(5, 12, t);
    const Matrix d = zoo::product(a, zoo::cast<double>(plain(g)));
    EXPECT_LE(zoo::relative_error(turned(zoo::product(a, g)), d), 4e-3) << t;
  }
}

TEST(Kronecker, CountsWhatItComputes) {
  const Lmo lmo{{}};
  const double m = 100, n = 300;
  const auto flops = [&](const std::string& name, double frequency) {
    const Maker run(rule(name, {{"frequency", frequency}}), 100, 300);
    EXPECT_GT(run.direction().product_flops(lmo, 100, 300), run.direction().flops(lmo, 100, 300));
    return run.direction().flops(lmo, 100, 300);
  };
  const double both = m * n * (m + n);
  const double cubes = m * m * m + n * n * n;
  EXPECT_NEAR(flops("shampoo", 10), 3 * both + 10 * cubes / 10, 1);
  EXPECT_NEAR(flops("kl_shampoo", 5), 5 * both + 10 * cubes / 5, 1);
  EXPECT_NEAR(flops("one_sided_shampoo", 10), 3 * m * m * n + 10 * m * m * m / 10, 1);
  EXPECT_NEAR(flops("soap", 10), 7 * both + 5 * cubes / 10, 1);
  const Maker eigh(rule("shampoo", {{"root", std::string("eigh")}}), 6, 15);
  EXPECT_EQ(eigh.direction().description(lmo, 6),
            "inverse fourth roots by eigenvectors, every 10 steps");
}

// ---- defaults -----------------------------------------------------------------------------------

TEST(Kronecker, DefaultsTrain) {
  // ½‖A(W − W*)B‖² with condition 30 on both sides, and noise in the gradients.
  for (const std::string name : kRules) {
    const Index rows = 12, cols = 20;
    const Matrix a = gram_of_rows(zoo::condition(rows, rows, 5.5, 1));
    const Matrix b = gram_of_rows(zoo::condition(cols, cols, 5.5, 2));
    const Matrix target = zoo::scaled(zoo::gaussian(rows, cols, 3), 0.1);
    Runner run(rule(name), zoo::zero(rows, cols));
    const auto slope = [&] {
      const Matrix off = sum(1, zoo::cast<double>(run.weights), -1, target);
      const Matrix g = zoo::product(zoo::product(a, off), b);
      return std::pair{g, zoo::inner(off, g) / 2};
    };
    const double start = slope().second;
    for (int t = 1; t <= 300; ++t) {
      run.step(sum(1, slope().first, 1e-3, gradient(rows, cols, t)));
    }
    EXPECT_LE(slope().second, 0.05 * start) << name;
  }
}

}  // namespace
}  // namespace orthrus::optim
