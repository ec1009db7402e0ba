#pragma once
/// @file
/// Kronecker: what Shampoo, one-sided Shampoo, KL-Shampoo and SOAP share. L and R, factors of what
/// gradients have been, join every one of them; what is made of the factors costs more, and is
/// renewed now and then.

#include <cstddef>
#include <cstdint>
#include <orthrus/view.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/eigh.hpp"
#include "kernels/spd_root.hpp"
#include "optim/momentum.hpp"

namespace orthrus::optim {

/// In which steps what is costly is renewed: in each of the first `every`, while a factor still
/// lacks directions that the next gradient has, and an old root would lift those by a hundred; then
/// in every `every`-th, other matrices in other steps.
struct Turns {
  std::int64_t every = 1;
  /// @param phase  as in `Whole`.
  [[nodiscard]] bool due(std::int64_t step, double phase) const;
  /// "every 10 steps".
  [[nodiscard]] std::string description() const;
  /// What of a renewal each step bears.
  [[nodiscard]] double share() const { return 1 / static_cast<double>(every); }
};

/// A ← βA + (1 − β)·GGᵀ, or A ← A + GGᵀ with β = 1.
struct Decay {
  double beta = 0;
  bool corrected = true;
  [[nodiscard]] double weight() const { return beta < 1 ? 1 - beta : 1; }
  /// What A is divided by in step t: 1 − βᵗ, or 1.
  [[nodiscard]] double correction(std::int64_t step) const;
};

/// A packed factor of a matrix, and what is made of it.
struct Factor {
  bool of_rows = true;
  Index side = 0;
  MatrixView packed;
  MatrixView made;  ///< a packed root, or a square of eigenvectors; all 0: there is none yet

  [[nodiscard]] std::string_view name() const {
    return of_rows ? "factor of its rows" : "factor of its columns";
  }
  [[nodiscard]] bool is_made(kernels::Backend& backend) const;
  /// full ← A. @param full  side×side.
  void load(MatrixView full, kernels::Backend& backend) const;
  /// A ← full, if every entry is finite: else A stays as it was, so that no gradient can spoil it
  /// for ever. @return whether it is.
  [[nodiscard]] bool store(ConstMatrixView full, kernels::Backend& backend) const;
  /// full ← what is made.
  void load_root(MatrixView full, kernels::Backend& backend) const;
  void store_root(ConstMatrixView full, kernels::Backend& backend) const;
};

/// Failures of one matrix in one step. What is there from before serves again, for so many steps in
/// a row.
class Failures {
 public:
  /// @param count    the state that counts them. @param problem  as in `Whole`.
  Failures(MatrixView count, int tolerated, std::string* problem, kernels::Backend& backend)
      : count_(count), tolerated_(tolerated), problem_(problem), backend_(backend) {}

  /// @param what  that was not renewed. @param serves  is there something from before?
  void add(std::string_view what, std::string_view why, bool serves);
  void not_finite(const Factor& factor, bool serves);
  [[nodiscard]] bool any() const { return !text_.empty(); }
  /// When all is done. @param renewed  it was time to.
  /// @throws NumericError  nothing serves, or it has served too often.
  void settle(bool renewed);

 private:
  MatrixView count_;
  int tolerated_;
  std::string* problem_;
  kernels::Backend& backend_;
  std::string text_;
  bool serves_ = true;
};

/// A ← βA + w·ZZᵀ, or ZᵀZ of a factor of columns; where that is not finite A stays, and `failures`
/// says so. @param[out] full  side×side: what A would be. @return whether it is.
[[nodiscard]] bool take_in(const Factor& factor, double beta, double weight, ConstMatrixView z,
                           MatrixView full, kernels::Backend& backend, Failures& failures);

/// D^(−exponent) of a factor.
class InverseRoot {
 public:
  enum class By : std::uint8_t {
    automatic,  ///< eigenvectors where the host computes, else products, if they know the exponent
    eigenvectors,
    products,  ///< `spd_root`
  };
  static RuleKey key();
  /// @throws ConfigError  of products, for exponents other than 1/4, 1/2, 3/4 and 1.
  InverseRoot(double exponent, kernels::Damping damping, kernels::Eigenvalues how,
              std::string_view by);

  /// What keeps a factor of this side from having one; empty: nothing.
  [[nodiscard]] std::string obstacle(Index side) const;
  [[nodiscard]] By by() const { return by_; }
  /// Of products.
  [[nodiscard]] const kernels::Damping& damping() const { return options_.damping; }
  /// What keeps the root in f32 from having an inverse; empty: nothing.
  [[nodiscard]] std::string inverse_obstacle() const;
  [[nodiscard]] std::size_t workspace_bytes(Index m) const;
  [[nodiscard]] double flops(Index m) const;
  [[nodiscard]] double product_flops(Index m) const;
  /// "inverse fourth roots by eigenvectors".
  [[nodiscard]] std::string description() const;

  /// The factor's root, of A/`correction`. Of a factor that is 0 it is 0.
  /// @param lifts  multiplies it by tr(A/correction)^(exponent/2).
  /// @param full   scratch of the factor's shape.
  void renew(const Factor& factor, double correction, bool lifts, MatrixView full,
             std::span<std::byte> work, kernels::Backend& backend, Failures& failures) const;

 private:
  [[nodiscard]] bool has_products() const { return options_.r > 0; }
  void make(MatrixView p, std::span<std::byte> work, kernels::Backend& backend) const;

  double exponent_;
  kernels::Damping damping_;
  kernels::Eigenvalues how_;
  By by_ = By::automatic;
  kernels::RootOptions options_;
  int power_ = 1;
};

/// full ← the inverse of a root, times `scale`; NaN if it has none. 0 of a root that is not made.
/// @param work  `inverse_workspace_bytes`.
void invert_root(const Factor& factor, double scale, MatrixView full, std::span<std::byte> work,
                 kernels::Backend& backend);
std::size_t inverse_workspace_bytes(Index side);

/// What a direction of factors of the whole matrix can say of itself.
class KroneckerDirection : public Direction {
 public:
  [[nodiscard]] LmoUse lmo_use() const override { return LmoUse::none; }
  [[nodiscard]] bool asks_for_gradient() const final { return true; }
  [[nodiscard]] bool orthogonalizes(const Lmo&) const final { return true; }
  [[nodiscard]] bool waits(const Lmo&, Index) const final { return true; }
  [[nodiscard]] bool is_linear() const override { return true; }
  [[nodiscard]] bool has_lmo_gram() const final { return false; }
  /// All states of the rule; the first is the momentum.
  [[nodiscard]] std::span<const StateSpec> state() const { return state_; }
  [[nodiscard]] double momentum() const { return momentum_.beta; }

 protected:
  KroneckerDirection(const RuleConfig& c, Decay momentum, Decay factors,
                     std::vector<StateSpec> state);

  [[nodiscard]] Failures failures(const Whole& m, kernels::Backend& backend,
                                  std::size_t count) const {
    return {m.state[count], tolerated_, m.problem, backend};
  }

  Turns turns_;
  Decay momentum_, factors_;

 private:
  int tolerated_;
  std::vector<StateSpec> state_;
};

/// The keys that all have.
std::vector<RuleKey> kronecker_keys(double lr, double frequency = 10);

/// X is the momentum; the rest is its direction's.
template <class D>
class KroneckerRule final : public MomentumRule {
 public:
  explicit KroneckerRule(const RuleConfig& c) : KroneckerRule(D(c)) {}

  [[nodiscard]] std::span<const StateSpec> state() const override { return direction_.state(); }
  [[nodiscard]] const Direction& direction() const override { return direction_; }

 private:
  explicit KroneckerRule(D direction)
      : MomentumRule(Momentum(direction.momentum())), direction_(std::move(direction)) {}

  D direction_;
};

template <class D>
RuleRow kronecker_row(std::string_view name, std::string_view doc, std::vector<RuleKey> keys) {
  return {name, doc, std::move(keys),
          [](const RuleConfig& c) -> std::unique_ptr<Rule> {
            return std::make_unique<KroneckerRule<D>>(c);
          },
          true};
}

}  // namespace orthrus::optim
