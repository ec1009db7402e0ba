// PRISM (arXiv:2602.03096) and Bidirectional-PRISM: a direction is damped where what the gradient
// brings anew, N = G − M, is large beside the momentum M.
//
//   prism, left:    D = (MMᵀ + γ²NNᵀ)^-½ M, the columns of M in msign [M, γN]
//   prism, right:   D = M (MᵀM + γ²NᵀN)^-½, the rows of M in msign [M; γN]
//   bidirectional:  D = L^-¼ M R^-¼,  L = MMᵀ + γ_L²NNᵀ + δ_L,  R = MᵀM + γ_R²NᵀN + δ_R
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
#include "kernels/eigh.hpp"
#include "kernels/gram.hpp"
#include "kernels/msign.hpp"
#include "optim/lmo.hpp"
#include "optim/matrix_function.hpp"
#include "optim/momentum.hpp"

namespace orthrus::optim {
namespace {

using kernels::Backend;
using kernels::carve;
using kernels::part;
using kernels::piece_bytes;
using kernels::Transpose;

/// Z = [X, Y] or [X; Y] in scratch.
struct Stacked {
  MatrixView z, x, y;
  bool beside = true;

  static std::size_t bytes(Index rows, Index cols) {
    return piece_bytes(2 * rows, cols, DType::f32);
  }
  Stacked(std::span<std::byte>& work, Index rows, Index cols, bool side_by_side)
      : z(side_by_side ? carve(work, rows, 2 * cols, DType::f32)
                       : carve(work, 2 * rows, cols, DType::f32)),
        x(part(z, 0, rows, 0, cols)),
        y(side_by_side ? part(z, 0, rows, cols, cols) : part(z, rows, rows, 0, cols)),
        beside(side_by_side) {}
};

/// What both share: X is the momentum, and N = G − X.
class Innovation : public Direction {
 public:
  [[nodiscard]] bool asks_for_gradient() const final { return true; }
  [[nodiscard]] bool orthogonalizes(const Lmo&) const final { return true; }
  [[nodiscard]] std::string obstacle(Mode mode, Index rows, Index cols, bool of_rows,
                                     bool with_root) const final {
    if (std::string why = side_obstacle(std::min(rows, cols)); !why.empty()) return why;
    const bool of_pieces = uses_gram(mode) || mode == Mode::block_cyclic;
    return of_pieces ? pieces_obstacle(mode, rows, cols, of_rows, with_root) : "";
  }
  void companion(ConstMatrixView x, MatrixView g, const StepScalars& s,
                 Backend& backend) const final {
    const double gamma = damps_first_ || s.step > 1 ? weight() : 0;
    backend.axpby(-gamma, x, gamma, g);
  }

 protected:
  explicit Innovation(const RuleConfig& c) : damps_first_(c.flag("damp_first_step")) {}
  /// γ of Y = γN.
  [[nodiscard]] virtual double weight() const = 0;
  /// What keeps it from a mode in which pieces of Z stay where they are.
  [[nodiscard]] virtual std::string pieces_obstacle(Mode mode, Index rows, Index cols, bool of_rows,
                                                    bool with_root) const = 0;
  /// What keeps a matrix of this shorter side from any mode.
  [[nodiscard]] virtual std::string side_obstacle(Index /*side*/) const { return {}; }

  /// X and Y of a whole matrix.
  void put(const Whole& m, const StepScalars& s, const Stacked& to, Backend& backend) const {
    companion(m.x, m.g, s, backend);
    backend.convert(m.x, 1, to.x);
    backend.convert(m.g, 1, to.y);
  }

 private:
  bool damps_first_;
};

// ---- one side ----------------------------------------------------------------------------------

class Prism final : public Innovation {
 public:
  explicit Prism(const RuleConfig& c)
      : Innovation(c), gamma_(c.number("gamma")), side_(c.word("side")) {}

  [[nodiscard]] Stack stack(Index rows, Index cols) const override {
    const bool left =
        side_ == "left" || (side_ == "short" && rows <= cols) || (side_ == "long" && rows > cols);
    return left ? Stack::beside : Stack::above;
  }

  [[nodiscard]] double flops(const Lmo& lmo, Index rows, Index cols) const override {
    const auto [r, c] = of_stack(rows, cols);
    return lmo.flops(r, c);
  }
  [[nodiscard]] std::string description(const Lmo& lmo, Index side) const override {
    return lmo.description(side) + ", " + side_;
  }
  [[nodiscard]] bool waits(const Lmo& lmo, Index side) const override {
    return lmo.waits(side) || lmo.waits(2 * side);
  }
  [[nodiscard]] std::size_t workspace_bytes(const Lmo& lmo, Index rows, Index cols) const override {
    const auto [r, c] = of_stack(rows, cols);
    return Stacked::bytes(rows, cols) + lmo.workspace_bytes(r, c);
  }
  void make(const Whole& m, const Lmo& lmo, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    const Stacked all(work, m.x.rows, m.x.cols, is_beside(m.x));
    put(m, s, all, backend);
    if (of_short_side(m.x.rows, m.x.cols)) {  // X lies along the long side
      lmo.first_lines(all.z, all.beside ? m.x.cols : m.x.rows, work, backend);
    } else {
      lmo(all.z, work, backend);
    }
    backend.convert(all.x, 1, m.x);
  }

  // P⁻¹ = (ZZᵀ)^½ on the left, (ZᵀZ)^½ on the right. Where that side of Z is the longer one, it is
  // OZᵀ or ZᵀO, O = lmo Z, and is not made.
  [[nodiscard]] std::size_t root_bytes(const Lmo& lmo, Index rows, Index cols) const override {
    const auto [r, c] = of_stack(rows, cols);
    return of_short_side(rows, cols) ? kernels::padded(lmo.root_bytes(r, c))
                                     : 2 * piece_bytes(r, c, DType::f32);
  }
  [[nodiscard]] std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                 Index cols) const override {
    const auto [r, c] = of_stack(rows, cols);
    return of_short_side(rows, cols) ? Stacked::bytes(rows, cols) + lmo.root_workspace_bytes(r, c)
                                     : std::max(workspace_bytes(lmo, rows, cols),
                                                piece_bytes(2 * rows, cols, DType::f32));
  }
  void make_with_root(const Whole& m, const Lmo& lmo, const StepScalars& s,
                      std::span<std::byte> root, std::span<std::byte> work,
                      Backend& backend) const override {
    const Stacked all(work, m.x.rows, m.x.cols, is_beside(m.x));
    put(m, s, all, backend);
    if (of_short_side(m.x.rows, m.x.cols)) {
      lmo.with_root(all.z, root, work, backend);
    } else {
      backend.convert(all.z, 1, carve(root, all.z.rows, all.z.cols, DType::f32));
      lmo(all.z, work, backend);
      backend.convert(all.z, 1, carve(root, all.z.rows, all.z.cols, DType::f32));
    }
    backend.convert(all.x, 1, m.x);
  }
  void undo(const Lmo&, const StepScalars&, std::span<std::byte> root, std::span<const MatrixView>,
            ConstMatrixView e, MatrixView c, std::span<std::byte> work,
            Backend& backend) const override {
    const bool left = stack(e.rows, e.cols) == Stack::beside;
    const auto [r, n] = of_stack(e.rows, e.cols);
    const auto product = [&](ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
                             MatrixView to) { backend.gemm(1, a, op_a, b, op_b, 0, to); };
    if (of_short_side(e.rows, e.cols)) {
      const Index side = std::min(r, n);
      const MatrixView half = matrix_view(reinterpret_cast<float*>(root.data()), side, side);
      return left ? product(half, Transpose::no, e, Transpose::no, c)
                  : product(e, Transpose::no, half, Transpose::no, c);
    }
    const MatrixView z = carve(root, r, n, DType::f32);
    const MatrixView o = carve(root, r, n, DType::f32);
    const MatrixView across =
        left ? carve(work, n, e.cols, DType::f32) : carve(work, e.rows, r, DType::f32);
    if (left) {
      product(z, Transpose::yes, e, Transpose::no, across);
      product(o, Transpose::no, across, Transpose::no, c);
    } else {
      product(e, Transpose::no, z, Transpose::yes, across);
      product(across, Transpose::no, o, Transpose::no, c);
    }
  }

 protected:
  [[nodiscard]] double weight() const override { return gamma_; }
  [[nodiscard]] std::string pieces_obstacle(Mode, Index rows, Index cols, bool of_rows,
                                            bool with_root) const override {
    if (!with_root || gram_blocks(stack(rows, cols), of_rows) == 1) return {};
    return "side " + side_ +
           " has its root on the side that shards cut, which weights.residual "
           "momentum needs: side short, or owner, exchange or gather";
  }

 private:
  [[nodiscard]] bool is_beside(const MatrixView& x) const {
    return stack(x.rows, x.cols) == Stack::beside;
  }
  /// Is the side of D's inverse root the shorter one of Z, the rows of a square? X lies along the
  /// other one.
  [[nodiscard]] bool of_short_side(Index rows, Index cols) const {
    return stack(rows, cols) == Stack::beside ? rows <= 2 * cols : cols < 2 * rows;
  }
  /// Z's shape.
  [[nodiscard]] std::pair<Index, Index> of_stack(Index rows, Index cols) const {
    return stack(rows, cols) == Stack::beside ? std::pair{rows, 2 * cols}
                                              : std::pair{2 * rows, cols};
  }

  double gamma_;
  std::string side_;
};

// ---- both sides --------------------------------------------------------------------------------

/// Never forms a matrix of the long side: with Z = [M; N] (m ≤ n), and f(ZᵀZ) for which
/// Zf(ZᵀZ) = f(ZZᵀ)Z, all follows from ZZᵀ, 2m×2m:
///
///     D = L^-¼ [I 0] (K + δ_R)^-¼ Z',   Z' = [M; γ_R N],   K = Z'Z'ᵀ
class BidirectionalPrism final : public Innovation {
 public:
  explicit BidirectionalPrism(const RuleConfig& c)
      : Innovation(c),
        left_(c.number("gamma_left")),
        right_(c.number("gamma_right")),
        eps_(c.number("eps")) {}

  [[nodiscard]] Stack stack(Index rows, Index cols) const override {
    return rows <= cols ? Stack::above : Stack::beside;
  }

  [[nodiscard]] double flops(const Lmo& lmo, Index rows, Index cols) const override {
    return on_pieces(rows, cols) + gram_flops(lmo, 2 * std::min(rows, cols));
  }
  [[nodiscard]] double product_flops(const Lmo& lmo, Index rows, Index cols) const override {
    return on_pieces(rows, cols) + gram_product_flops(lmo, 2 * std::min(rows, cols));
  }
  [[nodiscard]] std::string description(const Lmo&, Index) const override {
    return "two fourth roots, by eigenvectors";
  }
  [[nodiscard]] LmoUse lmo_use() const override { return LmoUse::scale; }
  [[nodiscard]] bool waits(const Lmo&, Index) const override { return true; }

  [[nodiscard]] std::size_t workspace_bytes(const Lmo& lmo, Index rows, Index cols) const override {
    const Index side = 2 * std::min(rows, cols);
    return Stacked::bytes(rows, cols) + 2 * piece_bytes(side, side, DType::f32) +
           std::max(gram_workspace_bytes(lmo, side, false),
                    kernels::gram_accumulate_workspace_bytes(side));
  }
  void make(const Whole& m, const Lmo& lmo, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    const Stacked all(work, m.x.rows, m.x.cols, m.x.rows > m.x.cols);
    make_of(all, m, lmo, s, {}, work, backend);
  }

  [[nodiscard]] bool has_symmetric_gram() const override { return false; }
  [[nodiscard]] bool has_gram_form(const Lmo&, Index) const override { return true; }
  [[nodiscard]] bool has_lmo_gram() const override { return false; }
  [[nodiscard]] bool sums_in_f64(const Lmo&) const override { return true; }
  [[nodiscard]] double gram_flops(const Lmo&, Index side) const override {
    const auto m = static_cast<double>(side) / 2;
    return kernels::eigh_root_flops(m) + kernels::eigh_root_flops(2 * m) + 4 * m * m * m;
  }
  [[nodiscard]] double gram_product_flops(const Lmo&, Index side) const override {
    const auto m = static_cast<double>(side) / 2;
    return kernels::eigh_root_product_flops(m) + kernels::eigh_root_product_flops(2 * m) +
           4 * m * m * m;
  }
  [[nodiscard]] std::size_t gram_workspace_bytes(const Lmo&, Index side, bool) const override {
    return piece_bytes(side / 2, side / 2, DType::f32) +
           std::max(kernels::spd_root_eigh_workspace_bytes(side / 2),
                    piece_bytes(side, side, DType::f64) + piece_bytes(1, side, DType::f64) +
                        std::max(kernels::eigh_workspace_bytes(side),
                                 kernels::spectral_function_workspace_bytes(side)));
  }
  void gram(const GramForm& form, const Lmo&, const StepScalars&, std::span<std::byte> work,
            Backend& backend) const override {
    // Of R times a power of two the same bits: how Z was scaled may differ after a restart.
    const double trace = backend.trace(form.r);
    const int power = trace > 0 && std::isfinite(trace) ? std::ilogb(trace) : 0;
    kernels::scale_by_power(form.r, -power, backend);
    solve(form.r, form.of_rows, form.q, {}, work, backend);
    const MatrixView used = part(form.q, 0, form.q.rows / 2, 0, form.q.cols);
    backend.convert(used, std::exp2(-0.5 * power), used);
  }

  // P⁻¹E = L^¼ER^¼, and ER^¼ = δ^¼E + EZ'ᵀ·g(K)·Z' with g(x) = ((x + δ)^¼ − δ^¼)/x.
  [[nodiscard]] std::size_t root_bytes(const Lmo&, Index rows, Index cols) const override {
    const Index m = std::min(rows, cols);
    return piece_bytes(m, m, DType::f32) + piece_bytes(2 * m, 2 * m, DType::f32) +
           piece_bytes(1, 1, DType::f64) + Stacked::bytes(rows, cols);
  }
  [[nodiscard]] std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                 Index cols) const override {
    const Index m = std::min(rows, cols);
    return std::max(workspace_bytes(lmo, rows, cols),
                    2 * piece_bytes(m, 2 * m, DType::f32) + piece_bytes(rows, cols, DType::f32));
  }
  void make_with_root(const Whole& m, const Lmo& lmo, const StepScalars& s,
                      std::span<std::byte> root, std::span<std::byte> work,
                      Backend& backend) const override {
    const Roots roots(root, m.x.rows, m.x.cols);
    make_of(*roots.stacked, m, lmo, s, roots, work, backend);
    const double gamma = m.x.rows <= m.x.cols ? right_ : left_;
    backend.convert(roots.stacked->y, gamma, roots.stacked->y);  // Z'
  }
  void undo(const Lmo&, const StepScalars&, std::span<std::byte> root, std::span<const MatrixView>,
            ConstMatrixView e, MatrixView c, std::span<std::byte> work,
            Backend& backend) const override {
    const Roots roots(root, e.rows, e.cols);
    kernels::OnHost<const double> quarter(backend, roots.quarter, 1);
    const MatrixView z = roots.stacked->z;
    const Index m = std::min(e.rows, e.cols);
    const MatrixView whole = carve(work, e.rows, e.cols, DType::f32);
    backend.convert(e, quarter.data()[0], whole);
    if (e.rows <= e.cols) {
      const MatrixView across = carve(work, m, 2 * m, DType::f32);
      const MatrixView scaled = carve(work, m, 2 * m, DType::f32);
      backend.gemm(1, e, Transpose::no, z, Transpose::yes, 0, across);
      backend.gemm(1, across, Transpose::no, roots.g, Transpose::no, 0, scaled);
      backend.gemm(1, scaled, Transpose::no, z, Transpose::no, 1, whole);
      backend.gemm(1, roots.left, Transpose::no, whole, Transpose::no, 0, c);
    } else {
      const MatrixView across = carve(work, 2 * m, m, DType::f32);
      const MatrixView scaled = carve(work, 2 * m, m, DType::f32);
      backend.gemm(1, z, Transpose::yes, e, Transpose::no, 0, across);
      backend.gemm(1, roots.g, Transpose::no, across, Transpose::no, 0, scaled);
      backend.gemm(1, z, Transpose::no, scaled, Transpose::no, 1, whole);
      backend.gemm(1, whole, Transpose::no, roots.left, Transpose::no, 0, c);
    }
  }

 protected:
  [[nodiscard]] double weight() const override { return 1; }
  [[nodiscard]] std::string pieces_obstacle(Mode mode, Index rows, Index cols, bool of_rows,
                                            bool with_root) const override {
    if (mode != Mode::gram) {
      return "its fourth roots are no iterations to share: owner, exchange, gather or gram";
    }
    if (of_rows != (rows <= cols))
      return "its shards cut the short side: owner, exchange or gather";
    return with_root
               ? "the root of its long side is nowhere whole, which weights.residual momentum "
                 "needs: owner, exchange or gather"
               : "";
  }
  [[nodiscard]] std::string side_obstacle(Index side) const override {
    if (2 * side <= kernels::largest_eigh_side) return {};
    return "eigenvectors of twice its shorter side, " + std::to_string(2 * side) +
           ", are more than LAPACK has numbers for (" + std::to_string(kernels::largest_eigh_side) +
           "): prism";
  }

 private:
  /// What undoes a direction: root of the short side's factor, g, Z and δ^¼ of the other's.
  struct Roots {
    MatrixView left, g;
    double* quarter = nullptr;
    std::optional<Stacked> stacked;
    Roots() = default;
    Roots(std::span<std::byte> root, Index rows, Index cols) {
      const Index m = std::min(rows, cols);
      left = carve(root, m, m, DType::f32);
      g = carve(root, 2 * m, 2 * m, DType::f32);
      quarter = static_cast<double*>(carve(root, 1, 1, DType::f64).data);
      stacked.emplace(root, rows, cols, rows > cols);
    }
  };

  /// Flops of ZZᵀ and of QZ.
  static double on_pieces(Index rows, Index cols) {
    const auto m = static_cast<double>(std::min(rows, cols));
    const auto n = static_cast<double>(std::max(rows, cols));
    return 8 * m * m * n;
  }

  void make_of(const Stacked& all, const Whole& m, const Lmo&, const StepScalars& s,
               const Roots& roots, std::span<std::byte> work, Backend& backend) const {
    put(m, s, all, backend);
    const bool wide = m.x.rows <= m.x.cols;
    const Index side = 2 * std::min(m.x.rows, m.x.cols);
    const MatrixView r = carve(work, side, side, DType::f32);
    const MatrixView q = carve(work, side, side, DType::f32);
    // D does not depend on how large Z is; squares do.
    const double largest = backend.abs_max(all.z);
    const int exponent = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
    kernels::scale_by_power(all.z, -exponent, backend);
    kernels::gram_accumulate(1, all.z, wide, 0, r, work, backend);
    solve(r, wide, q, roots, work, backend);
    if (roots.stacked) backend.convert(roots.left, std::ldexp(1.0, exponent), roots.left);
    const MatrixView used = part(q, 0, side / 2, 0, side);
    if (wide) {
      backend.gemm(1, used, Transpose::no, all.z, Transpose::no, 0, m.x);
    } else {
      backend.gemm(1, all.z, Transpose::no, used, Transpose::yes, 0, m.x);
    }
  }

  /// Q's first m rows ← [A₁ A₂] with D = A₁M + A₂N. @param r  ZZᵀ of Z = [M; N]; spoiled.
  /// @param wide  of rows. @param[out] roots  empty, or what undoes D.
  void solve(MatrixView r, bool wide, MatrixView q, const Roots& roots, std::span<std::byte> work,
             Backend& backend) const {
    const Index side = r.rows;
    const Index m = side / 2;
    const double near = wide ? left_ : right_;  // γ of the short side's factor
    const double far = wide ? right_ : left_;
    const MatrixView noise = part(r, m, m, m, m);
    const MatrixView l = carve(work, m, m, DType::f32);
    backend.convert(part(r, 0, m, 0, m), 1, l);
    backend.axpby(near * near, noise, 1, l);
    for (const MatrixView& cross : {part(r, 0, m, m, m), part(r, m, m, 0, m)}) {
      backend.convert(cross, far, cross);
    }
    backend.convert(noise, far * far, noise);
    const double trace = backend.trace(r);
    if (trace == 0 || backend.trace(l) == 0) {  // M is 0, and D is
      backend.fill(0, q);
      if (!roots.stacked) return;
      backend.fill(0, roots.left);
      backend.fill(0, roots.g);
      return keep(0, roots, backend);
    }
    kernels::spd_root_eigh(l, 0.25, {0, eps_, rounding}, kernels::Eigenvalues::damp, l, roots.left,
                           work, backend);
    // On this side, too, eps is a share of the mean over m directions.
    const double delta = kernels::Damping{0, 2 * eps_, rounding}.on_diagonal(
        trace, std::sqrt(backend.sum_squares(r)), side);
    const MatrixView vectors = carve(work, side, side, DType::f64);
    const MatrixView numbers = carve(work, 1, side, DType::f64);
    kernels::OnHost<double> values(backend, static_cast<double*>(numbers.data),
                                   static_cast<std::size_t>(side), /*fetch=*/false);
    const std::span<double> lambda = values.span();
    kernels::eigh(r, vectors, lambda, work, backend);
    for (double& x : lambda) x = std::pow(std::max(x, 0.0) + delta, -0.25);
    kernels::spectral_function(vectors, lambda, r, work, backend);
    const MatrixView first = part(q, 0, m, 0, side);
    backend.gemm(1, l, Transpose::no, part(r, 0, m, 0, side), Transpose::no, 0, first);
    const MatrixView second = part(first, 0, m, m, m);
    backend.convert(second, far, second);
    if (!roots.stacked) return;
    const double quarter = std::pow(delta, 0.25);
    for (double& x : lambda) {  // (x + δ)^-¼ before
      const double root = 1 / x;
      // x = root⁴ − δ = (root − δ^¼)(root + δ^¼)(root² + δ^½)
      x = 1 / ((root + quarter) * (root * root + quarter * quarter));
    }
    kernels::spectral_function(vectors, lambda, roots.g, work, backend);
    keep(quarter, roots, backend);
  }
  static void keep(double quarter, const Roots& roots, Backend& backend) {
    kernels::OnHost<double> kept(backend, roots.quarter, 1, /*fetch=*/false);
    kept.data()[0] = quarter;
    kept.put_back();
  }

  static constexpr double rounding = 0x1p-23;  ///< of a Gram matrix in f32, a share of its norm
  double left_, right_, eps_;
};

// ---- rules -------------------------------------------------------------------------------------

template <class D>
class OfInnovation final : public MomentumRule {
 public:
  explicit OfInnovation(const RuleConfig& c)
      : MomentumRule(Momentum(c.number("momentum"))), direction_(c) {}

  [[nodiscard]] std::span<const StateSpec> state() const override { return kState; }
  [[nodiscard]] const Direction& direction() const override { return direction_; }

 private:
  static constexpr StateSpec kState[] = {{"momentum", StateSpec::Extent::elements}};
  D direction_;
};

std::vector<RuleKey> shared_keys() {
  return {
      {"lr", 0.02, 0, 1e6, "learning rate of U = s D"},
      {"weight_decay", 0.0, 0, 1e6, "decoupled: W loses lr * weight_decay of itself"},
      {"momentum", 0.95, 0, below_one, "beta of M <- bM + (1-b)G"},
      {"damp_first_step", true, 0, 0,
       "M starts at 0, so its first steps are damped: the first by 1/sqrt(1 + (gamma b/(1-b))^2);"
       " false: that one is not"}};
}

}  // namespace

RuleRow prism_row() {
  std::vector<RuleKey> keys = shared_keys();
  keys.push_back({"gamma", 1.0, 0, 1e3, "how much G - M damps; 0: Muon"});
  keys.push_back({"side",
                  std::string("short"),
                  0,
                  0,
                  "whose Gram matrix: of the rows (left), the columns (right), the shorter or the "
                  "longer side",
                  {"short", "long", "left", "right"}});
  return {"prism", "Muon damped where G - M is large beside M; arXiv:2602.03096", std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> {
            return std::make_unique<OfInnovation<Prism>>(c);
          },
          true};
}

RuleRow bidirectional_prism_row() {
  std::vector<RuleKey> keys = shared_keys();
  keys.push_back({"gamma_left", 1.0, 0, 1e3, "how much G - M damps by its rows"});
  keys.push_back({"gamma_right", 1.0, 0, 1e3, "how much G - M damps by its columns"});
  keys.push_back(
      {"eps", 1e-6, 0, 1, "added to both Gram matrices, a share of their mean eigenvalue"});
  return {"bidirectional_prism",
          "D = L^-1/4 M R^-1/4 of Gram matrices with G - M in them; J. L. Cesista, "
          "leloykun.github.io/ponder/shampoo-prism",
          std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> {
            return std::make_unique<OfInnovation<BidirectionalPrism>>(c);
          },
          true};
}

}  // namespace orthrus::optim
