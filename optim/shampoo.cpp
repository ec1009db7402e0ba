// Shampoo (arXiv:1802.09568, 2002.09018), its one-sided form ASGO (arXiv:2503.20762), and
// KL-Shampoo (arXiv:2509.03378): the momentum between inverse roots of what gradients have been.
//
//   shampoo    L <- b L + (1-b) GG',  R <- b R + (1-b) G'G,     D = L^-1/4 M R^-1/4
//   one-sided  L <- b L + (1-b) GG' of the short side,          D = L^-1/2 M
//   KL         L <- b L + (1-b)/n G R^-1 G', R likewise by L^-1, D = L^-1/2 M R^-1/2
#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>

#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/gram.hpp"
#include "kernels/msign.hpp"
#include "optim/block_cyclic_root.hpp"
#include "optim/kronecker.hpp"
#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"

namespace orthrus::optim {
namespace {

using kernels::Backend;
using kernels::carve;
using kernels::piece_bytes;
using kernels::Transpose;
using Extent = StateSpec::Extent;

/// A Gram matrix in f32 is rounded by this share of its norm: smaller eigenvalues are not known.
constexpr double rounding = 0x1p-24;

// ---- two sides ---------------------------------------------------------------------------------

/// D = L_i·X·R_i/bc of whole matrices, where L_i and R_i are kept roots.
class TwoSided : public KroneckerDirection {
 public:
  [[nodiscard]] std::string obstacle(Mode mode, Index rows, Index cols, bool, bool) const override {
    if (std::string why = root_.obstacle(std::max(rows, cols)); !why.empty()) {
      return why + ": " + remedy();
    }
    if (is_bitwise(mode)) return {};
    return uses_gram(mode)
               ? "it needs the factors of both sides, and that of the side that shards cut is "
                 "nowhere whole: owner, exchange or gather"
               : "the factors of a piece are not those of the matrix: owner, exchange or gather";
  }
  [[nodiscard]] double flops(const Lmo&, Index rows, Index cols) const override {
    return products(rows, cols) + turns_.share() * (root_.flops(rows) + root_.flops(cols));
  }
  [[nodiscard]] double product_flops(const Lmo&, Index rows, Index cols) const override {
    return products(rows, cols) +
           turns_.share() * (root_.product_flops(rows) + root_.product_flops(cols));
  }
  [[nodiscard]] std::string description(const Lmo&, Index) const override {
    return root_.description() + ", " + turns_.description();
  }

  [[nodiscard]] std::size_t workspace_bytes(const Lmo&, Index rows, Index cols) const override {
    const Index side = std::max(rows, cols);
    return 2 * piece_bytes(rows, cols, DType::f32) + piece_bytes(side, side, DType::f32) +
           std::max({root_.workspace_bytes(rows), root_.workspace_bytes(cols)});
  }
  void make(const Whole& m, const Lmo&, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    make_of(m, s, work, backend);
  }

  [[nodiscard]] bool is_linear() const override { return !grafts_; }
  [[nodiscard]] std::string undo_obstacle() const override { return root_.inverse_obstacle(); }
  /// By how much it is grafted.
  [[nodiscard]] std::size_t root_bytes(const Lmo&, Index, Index) const override {
    return grafts_ ? piece_bytes(1, 1, DType::f64) : 0;
  }
  [[nodiscard]] std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                 Index cols) const override {
    const Index side = std::max(rows, cols);
    return std::max(workspace_bytes(lmo, rows, cols), piece_bytes(rows, cols, DType::f32) +
                                                          piece_bytes(side, side, DType::f32) +
                                                          inverse_workspace_bytes(side));
  }
  void make_with_root(const Whole& m, const Lmo&, const StepScalars& s, std::span<std::byte> root,
                      std::span<std::byte> work, Backend& backend) const override {
    const double graft = make_of(m, s, work, backend);
    if (!grafts_) return;
    kernels::OnHost<double> kept(backend, reinterpret_cast<double*>(root.data()), 1,
                                 /*fetch=*/false);
    kept.data()[0] = graft;
    kept.put_back();
  }
  // The roots that D was made with are kept: their inverses, and not roots of what the factors are
  // by now, take E back.
  void undo(const Lmo&, const StepScalars& s, std::span<std::byte> root,
            std::span<const MatrixView> state, ConstMatrixView e, MatrixView c,
            std::span<std::byte> work, Backend& backend) const override {
    double scale = momentum_.correction(s.step);
    if (grafts_) {
      kernels::OnHost<double> kept(backend, reinterpret_cast<double*>(root.data()), 1);
      scale = kept.data()[0] > 0 ? scale / kept.data()[0] : 0;
    }
    const Factor left = left_of(state, e.rows);
    const Factor right = right_of(state, e.cols);
    const MatrixView between = carve(work, e.rows, e.cols, DType::f32);
    auto rest = work;
    MatrixView full = carve(rest, e.rows, e.rows, DType::f32);
    invert_root(left, scale, full, rest, backend);
    backend.gemm(1, full, Transpose::no, e, Transpose::no, 0, between);
    rest = work;
    full = carve(rest, e.cols, e.cols, DType::f32);
    invert_root(right, 1, full, rest, backend);
    backend.gemm(1, between, Transpose::no, full, Transpose::no, 0, c);
  }

 protected:
  TwoSided(const RuleConfig& c, Decay factors, InverseRoot root, bool lifts, bool grafts)
      : KroneckerDirection(c, {c.number("momentum"), c.flag("bias_correction")}, factors,
                           specs(grafts)),
        root_(root),
        lifts_(lifts),
        grafts_(grafts) {}

  static Factor left_of(std::span<const MatrixView> state, Index side) {
    return {true, side, state[1], state[2]};
  }
  static Factor right_of(std::span<const MatrixView> state, Index side) {
    return {false, side, state[3], state[4]};
  }
  /// G joins both factors. @return whether all is finite: else neither is as it should be.
  virtual bool join(const Factor& left, const Factor& right, const Whole& m,
                    std::span<std::byte> work, Backend& backend, Failures& failures) const = 0;
  /// Σ of squares of what D is to be as long as. @param work  of X's shape.
  virtual double graft(const Whole&, MatrixView /*second*/, bool /*joined*/, const StepScalars&,
                       std::span<std::byte> /*work*/, Backend&) const {
    return 0;
  }
  /// Of a side that is too long.
  [[nodiscard]] virtual std::string remedy() const = 0;
  /// Flops of joining.
  [[nodiscard]] virtual double joining(double m, double n) const { return m * n * (m + n); }

 private:
  static std::vector<StateSpec> specs(bool grafts) {
    std::vector<StateSpec> list{
        {"momentum", Extent::elements},       {"left_factor", Extent::left_factor},
        {"left_root", Extent::left_factor},   {"right_factor", Extent::right_factor},
        {"right_root", Extent::right_factor}, {"root_failures", Extent::one}};
    if (grafts) list.push_back({"second_moment", Extent::whole});
    return list;
  }
  [[nodiscard]] double products(Index rows, Index cols) const {
    const auto m = static_cast<double>(rows);
    const auto n = static_cast<double>(cols);
    return joining(m, n) + 2 * m * n * (m + n);
  }

  /// @return what multiplied D to graft it.
  double make_of(const Whole& m, const StepScalars& s, std::span<std::byte> work,
                 Backend& backend) const {
    const MatrixView x = m.x;
    const Factor left = left_of(m.state, x.rows);
    const Factor right = right_of(m.state, x.cols);
    Failures trouble = failures(m, backend, 5);
    const bool joined = join(left, right, m, work, backend, trouble);
    bool renewed = joined;
    for (const Factor& factor : {left, right}) {
      if (!turns_.due(s.step, m.phase) && factor.is_made(backend)) {
        renewed = false;
        continue;
      }
      auto rest = work;
      const MatrixView full = carve(rest, factor.side, factor.side, DType::f32);
      root_.renew(factor, factors_.correction(s.step), lifts_, full, rest, backend, trouble);
    }
    trouble.settle(renewed);

    double target = 0;
    if (grafts_) {
      const MatrixView second = matrix_view(static_cast<float*>(m.state[6].data), x.rows, x.cols);
      target = graft(m, second, joined, s, work, backend);
    }
    auto rest = work;
    const MatrixView between = carve(rest, x.rows, x.cols, DType::f32);
    auto square = rest;
    MatrixView full = carve(square, x.rows, x.rows, DType::f32);
    left.load_root(full, backend);
    backend.gemm(1 / momentum_.correction(s.step), full, Transpose::no, x, Transpose::no, 0,
                 between);
    square = rest;
    full = carve(square, x.cols, x.cols, DType::f32);
    right.load_root(full, backend);
    backend.gemm(1, between, Transpose::no, full, Transpose::no, 0, x);
    if (!grafts_) return 1;
    const double length = backend.sum_squares(x);
    const double factor = length > 0 ? std::sqrt(target / length) : 0;
    backend.convert(x, factor, x);
    return factor;
  }

  InverseRoot root_;
  bool lifts_, grafts_;
};

class Shampoo final : public TwoSided {
 public:
  explicit Shampoo(const RuleConfig& c)
      : TwoSided(c, {c.number("beta2"), c.flag("bias_correction")},
                 {c.number("exponent") > 0 ? c.number("exponent") : 0.25,
                  {c.number("eps"), 0, rounding},
                  kernels::Eigenvalues::shift,
                  c.word("root")},
                 c.flag("trace_scaling"), c.word("grafting") == "adam"),
        graft_beta_{c.number("grafting_beta2"), c.flag("bias_correction")},
        graft_eps_(c.number("grafting_eps")) {
    static_cast<void>(whole_number(c, "block"));  // the runtime cuts
  }

  static std::vector<RuleKey> keys() {
    // beta2 below 1: D is then as long as Muon's, whatever the step. Of sums (1) it gets shorter as
    // 1/sqrt(t), and lr wants to be larger.
    std::vector<RuleKey> keys = kronecker_keys(0.01);
    keys.insert(
        keys.end(),
        {{"momentum", 0.9, 0, below_one, "beta of M <- bM + (1-b)G"},
         {"beta2", 0.99, 0, 1, "decay of the factors; 1: they are sums"},
         {"bias_correction", true, 0, 0, "divide moments and factors by 1 - b^t"},
         {"eps", 1e-12, 0, 1e6,
          "added to the factors' eigenvalues, after the negative ones are lifted to 0"},
         {"exponent", 0.0, 0, 8, "of both inverse roots; 0: 1/4"},
         {"block", 1024.0, 0, 1e6,
          "matrices are cut into even blocks of at most block x block, each with factors of its "
          "own;"
          " 0: none is"},
         {"trace_scaling", false, 0, 0,
          "divide L (x) R by its trace per side: D times tr(L)^(e/2) tr(R)^(e/2), e the exponent"},
         {"grafting",
          std::string("none"),
          0,
          0,
          "D as long as what Adam would do (adam)",
          {"none", "adam"}},
         {"grafting_beta2", 0.999, 0, below_one, "decay of Adam's second moment"},
         {"grafting_eps", 1e-10, 0, 1, "added to its root"},
         InverseRoot::key()});
    return keys;
  }

 protected:
  bool join(const Factor& left, const Factor& right, const Whole& m, std::span<std::byte> work,
            Backend& backend, Failures& failures) const override {
    bool all = true;
    for (const Factor& factor : {left, right}) {
      auto rest = work;
      const MatrixView full = carve(rest, factor.side, factor.side, DType::f32);
      all = take_in(factor, factors_.beta, factors_.weight(), m.g, full, backend, failures) && all;
    }
    return all;
  }
  double graft(const Whole& m, MatrixView second, bool joined, const StepScalars& s,
               std::span<std::byte> work, Backend& backend) const override {
    const MatrixView still = carve(work, m.x.rows, m.x.cols, DType::f32);
    backend.fill(0, still);
    kernels::AdamWScalars adam;  // of a first moment that is X already, and weights that stay
    adam.beta1 = 1;
    adam.beta2 = joined ? graft_beta_.beta : 1;
    adam.eps = graft_eps_;
    adam.bias_correction1 = momentum_.correction(s.step);
    adam.bias_correction2 = graft_beta_.correction(s.step);
    if (!joined) backend.fill(0, m.g);
    return backend.adamw(adam, m.g, m.x, second, still);
  }
  [[nodiscard]] std::string remedy() const override { return "rule.block, or rule.root coupled"; }

 private:
  Decay graft_beta_;
  double graft_eps_;
};

/// The factors start as νI, ν the root mean square of the first gradient. So L ⊗ R begins as large
/// as the gradients' covariance is, and what each factor takes in by the other's inverse stays so:
/// from 0 their product would swing between too small and too large.
class KlShampoo final : public TwoSided {
 public:
  explicit KlShampoo(const RuleConfig& c)
      : TwoSided(c, {c.number("beta2"), false},
                 {0.5, {c.number("eps"), 0, rounding}, kernels::Eigenvalues::clamp, "eigh"}, false,
                 false) {}

  static std::vector<RuleKey> keys() {
    // D's entries are near 1, as Adam's are: so is lr.
    std::vector<RuleKey> keys = kronecker_keys(1e-3);
    keys.insert(keys.end(),
                {{"momentum", 0.9, 0, below_one, "beta of M <- bM + (1-b)G"},
                 {"beta2", 0.95, 0, below_one, "decay of the factors"},
                 {"bias_correction", false, 0, 0, "divide the momentum by 1 - b^t"},
                 {"eps", 1e-12, 0, 1e6, "smaller eigenvalues of the factors are this"}});
    return keys;
  }

 protected:
  bool join(const Factor& left, const Factor& right, const Whole& m, std::span<std::byte> work,
            Backend& backend, Failures& failures) const override {
    const MatrixView g = m.g;
    if (!left.is_made(backend) || !right.is_made(backend)) begin(left, right, g, work, backend);
    // What each takes in is made of the other's root, before either root is renewed.
    bool all = true;
    for (const Factor& factor : {left, right}) {
      auto rest = work;
      const MatrixView z = carve(rest, g.rows, g.cols, DType::f32);
      const Factor& other = factor.of_rows ? right : left;
      auto square = rest;
      MatrixView full = carve(square, other.side, other.side, DType::f32);
      other.load_root(full, backend);
      if (factor.of_rows) {
        backend.gemm(1, g, Transpose::no, full, Transpose::no, 0, z);
      } else {
        backend.gemm(1, full, Transpose::no, g, Transpose::no, 0, z);
      }
      square = rest;
      full = carve(square, factor.side, factor.side, DType::f32);
      const double weight = factors_.weight() / static_cast<double>(other.side);
      all = take_in(factor, factors_.beta, weight, z, full, backend, failures) && all;
    }
    return all;
  }
  [[nodiscard]] double joining(double m, double n) const override { return 3 * m * n * (m + n); }
  [[nodiscard]] std::string remedy() const override { return "soap or one_sided_shampoo"; }

 private:
  static void begin(const Factor& left, const Factor& right, ConstMatrixView g,
                    std::span<std::byte> work, Backend& backend) {
    const double mean = std::sqrt(backend.sum_squares(g) / static_cast<double>(g.size()));
    if (!(mean > 0) || !std::isfinite(mean)) return;
    for (const Factor& factor : {left, right}) {
      auto rest = work;
      const MatrixView full = carve(rest, factor.side, factor.side, DType::f32);
      backend.fill(0, full);
      backend.add_diagonal(mean, full);
      if (!factor.store(full, backend)) return;
      backend.fill(0, full);
      backend.add_diagonal(1 / std::sqrt(mean), full);
      factor.store_root(full, backend);
    }
  }
};

// ---- one side ----------------------------------------------------------------------------------

class OneSided final : public KroneckerDirection {
 public:
  explicit OneSided(const RuleConfig& c)
      : KroneckerDirection(c, {c.number("momentum"), c.flag("bias_correction")},
                           {c.number("beta2"), true},
                           {{"momentum", Extent::elements},
                            {"left_factor", Extent::short_factor},
                            {"left_root", Extent::short_factor},
                            {"root_failures", Extent::one}}),
        root_(0.5, {0, c.number("eps"), rounding}, kernels::Eigenvalues::damp, c.word("root")) {}

  static std::vector<RuleKey> keys() {
    // An old root lifts what is new in M by all that the factor lacked, and nothing is grafted.
    std::vector<RuleKey> keys = kronecker_keys(0.05, 1);
    keys.insert(keys.end(),
                {{"momentum", 0.95, 0, below_one, "beta of M <- bM + (1-b)G"},
                 {"beta2", 0.95, 0, 1, "decay of the factor; 1: it is a sum"},
                 {"bias_correction", false, 0, 0,
                  "divide the momentum by 1 - b^t, as the factor is in any case"},
                 {"eps", 1e-8, 0, 1, "added to the factor, a share of its mean eigenvalue"},
                 InverseRoot::key()});
    return keys;
  }

  [[nodiscard]] LmoUse lmo_use() const override { return LmoUse::scale; }
  [[nodiscard]] std::string obstacle(Mode mode, Index rows, Index cols, bool of_rows,
                                     bool with_root) const override {
    if (mode == Mode::block_cyclic) return grid_obstacle(with_root);
    if (std::string why = root_.obstacle(std::min(rows, cols)); !why.empty()) {
      return why + ": rule.root coupled";
    }
    if (is_bitwise(mode)) return {};
    switch (mode) {
      case Mode::gram:
        return of_rows == (rows <= cols) ? ""
                                         : "its shards cut the short side, whose factor it needs: "
                                           "owner, exchange or gather";
      case Mode::gram_steps:
        return "its root has no iterations to share: owner, exchange, gather or gram";
      default:
        return "the factor of a piece is not that of the matrix: owner, exchange, gather, gram or "
               "block_cyclic";
    }
  }
  [[nodiscard]] double flops(const Lmo& lmo, Index rows, Index cols) const override {
    return products(rows, cols) + gram_flops(lmo, std::min(rows, cols));
  }
  [[nodiscard]] double product_flops(const Lmo& lmo, Index rows, Index cols) const override {
    return products(rows, cols) + gram_product_flops(lmo, std::min(rows, cols));
  }
  [[nodiscard]] std::string description(const Lmo&, Index) const override {
    return root_.description() + ", " + turns_.description();
  }

  [[nodiscard]] std::size_t workspace_bytes(const Lmo&, Index rows, Index cols) const override {
    const Index side = std::min(rows, cols);
    return piece_bytes(side, side, DType::f32) + piece_bytes(rows, cols, DType::f32) +
           std::max(kernels::gram_accumulate_workspace_bytes(side), root_.workspace_bytes(side));
  }
  void make(const Whole& m, const Lmo&, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    const MatrixView x = m.x;
    const Index side = std::min(x.rows, x.cols);
    const bool wide = x.rows <= x.cols;
    const MatrixView to = carve(work, x.rows, x.cols, DType::f32);
    const MatrixView full = carve(work, side, side, DType::f32);
    const Factor factor = factor_of(m.state, side, wide);
    factor.load(full, backend);
    kernels::gram_accumulate(factors_.weight(), m.g, wide, factors_.beta, full, work, backend);
    joined(factor, full, m, s, work, backend);
    multiply(full, 1 / momentum_.correction(s.step), x, to, wide, backend);
    backend.convert(to, 1, x);
  }

  [[nodiscard]] std::size_t root_bytes(const Lmo&, Index, Index) const override { return 0; }
  [[nodiscard]] std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                 Index cols) const override {
    const Index side = std::min(rows, cols);
    return std::max(workspace_bytes(lmo, rows, cols),
                    piece_bytes(side, side, DType::f32) + inverse_workspace_bytes(side));
  }
  void make_with_root(const Whole& m, const Lmo& lmo, const StepScalars& s, std::span<std::byte>,
                      std::span<std::byte> work, Backend& backend) const override {
    make(m, lmo, s, work, backend);
  }
  void undo(const Lmo&, const StepScalars& s, std::span<std::byte>,
            std::span<const MatrixView> state, ConstMatrixView e, MatrixView c,
            std::span<std::byte> work, Backend& backend) const override {
    const Index side = std::min(e.rows, e.cols);
    const bool wide = e.rows <= e.cols;
    const MatrixView full = carve(work, side, side, DType::f32);
    invert_root(factor_of(state, side, wide), momentum_.correction(s.step), full, work, backend);
    multiply(full, 1, e, c, wide, backend);
  }

  [[nodiscard]] Stack stack(Index, Index) const override { return Stack::companion; }
  [[nodiscard]] bool has_gram_form(const Lmo&, Index) const override { return true; }
  [[nodiscard]] bool sums_in_f64(const Lmo&) const override { return true; }
  [[nodiscard]] double gram_flops(const Lmo&, Index side) const override {
    return turns_.share() * root_.flops(side);
  }
  [[nodiscard]] double gram_product_flops(const Lmo&, Index side) const override {
    return turns_.share() * root_.product_flops(side);
  }
  [[nodiscard]] std::size_t gram_workspace_bytes(const Lmo&, Index side, bool) const override {
    return piece_bytes(side, side, DType::f32) +
           std::max(root_.workspace_bytes(side), inverse_workspace_bytes(side));
  }
  void gram(const GramForm& form, const Lmo&, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    const Index side = form.r.rows;
    const MatrixView full = carve(work, side, side, DType::f32);
    const Factor factor = factor_of(form.state, side, form.of_rows);
    factor.load(full, backend);
    // In two powers of two: the square of one alone may be beyond f32.
    kernels::scale_by_power(form.r, form.exponent, backend);
    kernels::scale_by_power(form.r, form.exponent, backend);
    backend.axpby(factors_.weight(), form.r, factors_.beta, full);
    const Whole m{{}, {}, form.state, form.phase, form.problem};
    joined(factor, full, m, s, work, backend);
    const double correction = momentum_.correction(s.step);
    backend.convert(full, 1 / correction, form.q);
    if (form.with_root) invert_root(factor, correction, form.r, work, backend);
  }

  [[nodiscard]] bool has_grid_root() const override { return true; }
  [[nodiscard]] GridRoot grid_root(const StepScalars& s) const override {
    return {factors_.beta, factors_.weight(), factors_.correction(s.step), root_.damping(),
            1 / momentum_.correction(s.step)};
  }
  void settle(const GridRootReport& report, const Whole& m, Backend& backend) const override {
    Failures trouble = failures(m, backend, 3);
    const Factor factor = factor_of(m.state, std::min(m.x.rows, m.x.cols), m.x.rows <= m.x.cols);
    if (!report.joined) {
      trouble.not_finite(factor, report.serves);
    } else if (!report.renewed) {
      trouble.add(factor.name(),
                  "its root has not converged: the residual is " + std::to_string(report.residual),
                  report.serves);
    }
    trouble.settle(true);
  }

 private:
  /// The root is by products there, in every step, and nobody has it whole.
  [[nodiscard]] std::string grid_obstacle(bool with_root) const {
    if (with_root) {
      return "the root of its factor is nowhere whole, whose inverse weights.residual momentum "
             "needs: owner, exchange, gather or gram";
    }
    if (root_.by() == InverseRoot::By::eigenvectors) {
      return "rule.root eigh needs the factor on one rank: auto or coupled";
    }
    return turns_.every == 1 ? "" : "every step sends the same there: rule.frequency 1";
  }
  static Factor factor_of(std::span<const MatrixView> state, Index side, bool of_rows) {
    return {of_rows, side, state[1], state[2]};
  }
  static double products(Index rows, Index cols) {
    const auto side = static_cast<double>(std::min(rows, cols));
    return 3 * side * static_cast<double>(rows) * static_cast<double>(cols);
  }
  static void multiply(ConstMatrixView square, double scale, ConstMatrixView x, MatrixView to,
                       bool wide, Backend& backend) {
    if (wide) {
      backend.gemm(scale, square, Transpose::no, x, Transpose::no, 0, to);
    } else {
      backend.gemm(scale, x, Transpose::no, square, Transpose::no, 0, to);
    }
  }

  /// The factor is what `full` holds, with G; full ← the root that serves in this step.
  void joined(const Factor& factor, MatrixView full, const Whole& m, const StepScalars& s,
              std::span<std::byte> work, Backend& backend) const {
    Failures trouble = failures(m, backend, 3);
    const bool stored = factor.store(full, backend);
    if (!stored) trouble.not_finite(factor, factor.is_made(backend));
    const bool due = turns_.due(s.step, m.phase) || !factor.is_made(backend);
    if (due) {
      root_.renew(factor, factors_.correction(s.step), false, full, work, backend, trouble);
    }
    trouble.settle(due && stored);
    factor.load_root(full, backend);
  }

  InverseRoot root_;
};

}  // namespace

RuleRow shampoo_row() {
  return kronecker_row<Shampoo>(
      "shampoo", "D = L^-1/4 M R^-1/4, L and R of all G G' and G' G; arXiv:1802.09568, 2002.09018",
      Shampoo::keys());
}

RuleRow one_sided_shampoo_row() {
  return kronecker_row<OneSided>(
      "one_sided_shampoo", "D = L^-1/2 M, L of all G G' of the short side; ASGO, arXiv:2503.20762",
      OneSided::keys());
}

RuleRow kl_shampoo_row() {
  return kronecker_row<KlShampoo>(
      "kl_shampoo", "D = L^-1/2 M R^-1/2, each factor of G whitened by the other; arXiv:2509.03378",
      KlShampoo::keys());
}

}  // namespace orthrus::optim
