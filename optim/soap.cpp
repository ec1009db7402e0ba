// SOAP (arXiv:2409.11321): Adam in the eigenvectors of Shampoo's factors.
//
//   L <- b L + (1-b) GG',  R <- b R + (1-b) G'G,  Q_L and Q_R their eigenvectors, now and then
//   G' = Q_L' G Q_R,  M' = Q_L' M Q_R,  V <- b2 V + (1-b2) G'^2
//   D  = Q_L [(M'/c1) / (sqrt(V/c2) + eps)] Q_R'
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <orthrus/error.hpp>

#include "kernels/carve.hpp"
#include "kernels/device_memory.hpp"
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

class Soap final : public KroneckerDirection {
 public:
  explicit Soap(const RuleConfig& c)
      : KroneckerDirection(c, {betas(c)[0], true}, {c.number("shampoo_beta"), false}, specs(c)),
        second_{betas(c)[1], true},
        eps_(c.number("eps")),
        longest_(whole_number(c, "max_dimension")) {}

  static std::vector<RuleKey> keys() {
    std::vector<RuleKey> keys = kronecker_keys(3e-3);
    keys.insert(keys.end(), {{"betas", std::vector<double>{0.9, 0.95}, 0, below_one,
                              "decay of first and second moment"},
                             {"shampoo_beta", 0.95, 0, 1, "decay of the factors; 1: they are sums"},
                             {"eps", 1e-8, 0, 1, "added to the root of the second moment"},
                             {"max_dimension", 10000.0, 1, 32000,
                              "a longer side keeps its own basis, and has no factor"}});
    return keys;
  }

  [[nodiscard]] std::string obstacle(Mode mode, Index, Index, bool, bool) const override {
    if (is_bitwise(mode)) return {};
    return uses_gram(mode) ? "it divides entries in the eigenvectors of both sides, which no Gram "
                             "matrix does: owner, exchange or gather"
                           : "the eigenvectors of a piece are not those of the matrix: owner, "
                             "exchange or gather";
  }
  [[nodiscard]] bool takes_bf16() const override { return false; }
  [[nodiscard]] double flops(const Lmo&, Index rows, Index cols) const override {
    return on_sides(rows, cols, kernels::orthogonal_iteration_flops);
  }
  [[nodiscard]] double product_flops(const Lmo&, Index rows, Index cols) const override {
    return on_sides(rows, cols, kernels::orthogonal_iteration_product_flops);
  }
  [[nodiscard]] std::string description(const Lmo&, Index) const override {
    return "Adam in eigenvectors, renewed " + turns_.description();
  }

  [[nodiscard]] std::size_t workspace_bytes(const Lmo&, Index rows, Index cols) const override {
    return std::max(3 * piece_bytes(rows, cols, DType::f32),
                    std::max(refresh_bytes(rows, rows, cols), refresh_bytes(cols, rows, cols)));
  }
  void make(const Whole& m, const Lmo&, const StepScalars& s, std::span<std::byte> work,
            Backend& backend) const override {
    const MatrixView x = m.x;
    const auto sides = sides_of(m.state, x.rows, x.cols);
    const MatrixView second = second_of(m.state, x.rows, x.cols);
    Failures trouble = failures(m, backend, 5);
    bool renewed = true;
    bool joined = true;
    for (const Factor& factor : sides) {
      if (factor.side == 0) continue;
      auto rest = work;
      const MatrixView full = carve(rest, factor.side, factor.side, DType::f32);
      if (!take_in(factor, factors_.beta, factors_.weight(), m.g, full, backend, trouble)) {
        joined = false;
      } else if (turns_.due(s.step, m.phase) || !factor.is_made(backend)) {
        renew(factor, full, second, rest, backend, trouble);
      } else {
        renewed = false;
      }
    }
    if (sides[0].side == 0 && sides[1].side == 0) {
      joined = backend.sum_squares(m.g) < std::numeric_limits<float>::max();  // V is of f32
      if (!joined) trouble.add("second moment", "with this gradient it would not be finite", true);
    }
    trouble.settle(renewed && joined);

    const MatrixView between = carve(work, x.rows, x.cols, DType::f32);
    const MatrixView turned = carve(work, x.rows, x.cols, DType::f32);
    const MatrixView result = carve(work, x.rows, x.cols, DType::f32);
    if (!joined) backend.fill(0, m.g);
    rotate(sides, m.g, Transpose::no, between, m.g, backend);
    rotate(sides, x, Transpose::no, between, turned, backend);
    backend.fill(0, result);
    kernels::AdamWScalars adam = of_step(s);
    adam.beta1 = 1;  // the first moment is M'
    if (!joined) adam.beta2 = 1;
    adam.lr = -1;  // 0 + 1·U
    backend.adamw(adam, m.g, turned, second, result);
    rotate(sides, result, Transpose::yes, between, x, backend);
  }

  // P⁻¹E: E in the basis, times c₁(√(V/c₂) + ε), and back.
  [[nodiscard]] std::size_t root_bytes(const Lmo&, Index, Index) const override { return 0; }
  [[nodiscard]] std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                 Index cols) const override {
    return workspace_bytes(lmo, rows, cols);
  }
  void make_with_root(const Whole& m, const Lmo& lmo, const StepScalars& s, std::span<std::byte>,
                      std::span<std::byte> work, Backend& backend) const override {
    make(m, lmo, s, work, backend);
  }
  void undo(const Lmo&, const StepScalars& s, std::span<std::byte>,
            std::span<const MatrixView> state, ConstMatrixView e, MatrixView c,
            std::span<std::byte> work, Backend& backend) const override {
    const auto sides = sides_of(state, e.rows, e.cols);
    const MatrixView between = carve(work, e.rows, e.cols, DType::f32);
    const MatrixView turned = carve(work, e.rows, e.cols, DType::f32);
    const MatrixView result = carve(work, e.rows, e.cols, DType::f32);
    rotate(sides, e, Transpose::no, between, turned, backend);
    backend.fill(0, result);
    backend.adamw_pull_back(of_step(s), 1, second_of(state, e.rows, e.cols), turned, result);
    rotate(sides, result, Transpose::yes, between, c, backend);
  }

 private:
  using Sides = std::array<Factor, 2>;

  static const std::vector<double>& betas(const RuleConfig& c) {
    expects<ConfigError>(c.numbers("betas").size() == 2, "rule.betas must be two numbers");
    return c.numbers("betas");
  }
  static std::vector<StateSpec> specs(const RuleConfig& c) {
    const auto longest = whole_number(c, "max_dimension");
    return {{"momentum", Extent::elements},
            {"left_factor", Extent::left_factor, longest},
            {"left_vectors", Extent::left_square, longest},
            {"right_factor", Extent::right_factor, longest},
            {"right_vectors", Extent::right_square, longest},
            {"root_failures", Extent::one},
            {"second_moment", Extent::whole}};
  }
  /// A side that is longer than a factor may be: one of side 0.
  [[nodiscard]] Sides sides_of(std::span<const MatrixView> state, Index rows, Index cols) const {
    return {Factor{true, rows <= longest_ ? rows : 0, state[1], state[2]},
            Factor{false, cols <= longest_ ? cols : 0, state[3], state[4]}};
  }
  static MatrixView second_of(std::span<const MatrixView> state, Index rows, Index cols) {
    return matrix_view(static_cast<float*>(state[6].data), rows, cols);
  }
  [[nodiscard]] kernels::AdamWScalars of_step(const StepScalars& s) const {
    kernels::AdamWScalars adam;
    adam.beta1 = momentum_.beta;
    adam.beta2 = second_.beta;
    adam.eps = eps_;
    adam.bias_correction1 = momentum_.correction(s.step);
    adam.bias_correction2 = second_.correction(s.step);
    return adam;
  }
  template <class F>
  [[nodiscard]] double on_sides(Index rows, Index cols, F renewal) const {
    const double size = static_cast<double>(rows) * static_cast<double>(cols);
    double sum = 0;
    for (const Index side : {rows, cols}) {
      if (side > longest_) continue;
      // The factor, and three products with its eigenvectors.
      sum += 7 * size * static_cast<double>(side) +
             turns_.share() * renewal(static_cast<double>(side));
    }
    return sum;
  }
  [[nodiscard]] std::size_t refresh_bytes(Index side, Index rows, Index cols) const {
    if (side > longest_) return 0;
    return piece_bytes(side, side, DType::f32) + piece_bytes(side, side, DType::f64) +
           piece_bytes(1, side, DType::f64) +
           std::max({kernels::eigh_workspace_bytes(side),
                     kernels::orthogonal_iteration_workspace_bytes(side),
                     piece_bytes(rows, cols, DType::f32)});
  }

  /// to ← QᵀXQ of both sides, or back (`yes`). The kept squares hold eigenvectors as rows.
  /// @param to  may be `x`.
  static void rotate(const Sides& sides, ConstMatrixView x, Transpose back, MatrixView between,
                     MatrixView to, Backend& backend) {
    const auto square = [](const Factor& f) {
      return matrix_view(static_cast<float*>(f.made.data), f.side, f.side);
    };
    if (sides[0].side > 0) {
      backend.gemm(1, square(sides[0]), back, x, Transpose::no, 0, between);
    } else {
      backend.convert(x, 1, between);
    }
    if (sides[1].side > 0) {
      backend.gemm(1, between, Transpose::no, square(sides[1]),
                   back == Transpose::no ? Transpose::yes : Transpose::no, 0, to);
    } else {
      backend.convert(between, 1, to);
    }
  }

  /// Eigenvectors of `full`, the largest eigenvalue first. Where their order changes, so does that
  /// of the second moment's lines.
  void renew(const Factor& factor, ConstMatrixView full, MatrixView second,
             std::span<std::byte> work, Backend& backend, Failures& trouble) const {
    const Index side = factor.side;
    const MatrixView kept = matrix_view(static_cast<float*>(factor.made.data), side, side);
    const MatrixView vectors = carve(work, side, side, DType::f64);
    const bool first = !factor.is_made(backend);
    try {
      if (first) {
        const MatrixView numbers = carve(work, 1, side, DType::f64);
        kernels::OnHost<double> values(backend, static_cast<double*>(numbers.data),
                                       static_cast<std::size_t>(side), /*fetch=*/false);
        kernels::eigh(full, vectors, values.span(), work, backend);
        for (Index i = 0; i < side; ++i) {  // ascending
          backend.convert(kernels::part(vectors, side - 1 - i, 1, 0, side), 1,
                          kernels::part(kept, i, 1, 0, side));
        }
        return;
      }
      const MatrixView places = carve(work, 1, side, DType::f64);
      kernels::OnHost<Index> order(backend, static_cast<Index*>(places.data),
                                   static_cast<std::size_t>(side), /*fetch=*/false);
      backend.convert(kept, 1, vectors);
      kernels::orthogonal_iteration(full, vectors, order.span(), work, backend);
      backend.convert(vectors, 1, kept);
      permute(second, order.span(), factor.of_rows, work, backend);
    } catch (const NumericError& e) {
      trouble.add(factor.name(), e.what(), !first);
    }
  }

  static void permute(MatrixView second, std::span<const Index> order, bool rows,
                      std::span<std::byte> work, Backend& backend) {
    if (std::is_sorted(order.begin(), order.end())) return;
    const MatrixView before = carve(work, second.rows, second.cols, DType::f32);
    backend.convert(second, 1, before);
    const auto count = static_cast<std::size_t>(second.size());
    kernels::OnHost<const float> from(backend, static_cast<const float*>(before.data), count);
    kernels::OnHost<float> to(backend, static_cast<float*>(second.data), count, /*fetch=*/false);
    for (Index i = 0; i < second.rows; ++i) {
      for (Index j = 0; j < second.cols; ++j) {
        const Index line = order[static_cast<std::size_t>(rows ? i : j)];
        to.data()[i * second.cols + j] =
            from.data()[rows ? line * second.cols + j : i * second.cols + line];
      }
    }
    to.put_back();
  }

  Decay second_;
  double eps_;
  Index longest_;
};

}  // namespace

RuleRow soap_row() {
  return kronecker_row<Soap>("soap", "Adam in the eigenvectors of G G' and G' G; arXiv:2409.11321",
                             Soap::keys());
}

}  // namespace orthrus::optim
