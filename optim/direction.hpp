#pragma once
/// @file
/// Direction: what a matrix rule steps along. U = s·D, where D is lmo(X) of the momentum's X alone
/// (Muon), of X beside what the gradient brought anew (PRISM), or X between inverse roots of what
/// gradients have been (Shampoo).

#include <cstddef>
#include <cstdint>
#include <orthrus/view.hpp>
#include <span>
#include <string>

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {
struct GridRoot;
struct GridRootReport;
class Lmo;
enum class Mode : std::uint8_t;
struct StepScalars;

/// A matrix where its direction is made: all of it, f32.
struct Whole {
  MatrixView x;  ///< in: X, out: D
  MatrixView g;  ///< G, where it is asked for; spoiled. Else empty
  /// The rule's, in its order; what is per element is not looked at.
  std::span<const MatrixView> state = {};
  /// In [0, 1), another for every matrix: what is not done in every step is done in turns.
  double phase = 0;
  /// Out, where it is asked for: what went wrong and was made up for; else left as it is.
  std::string* problem = nullptr;
};

/// Z, of which the Gram matrix meets in mode gram, made of pieces of X and of Y, its companion.
enum class Stack : std::uint8_t {
  x,         ///< X
  beside,    ///< [X, Y]
  above,     ///< [X; Y]
  companion  ///< Y
};
/// How many lines of Z there are for each of X across the side whose Gram matrix it is.
constexpr Index gram_blocks(Stack stack, bool of_rows) noexcept {
  return stack == (of_rows ? Stack::above : Stack::beside) ? 2 : 1;
}

/// What mode gram finds D by: Q with D = QX, or with Z stacked along X's lines D = QZ.
struct GramForm {
  MatrixView r;         ///< in: ZZᵀ, f32; spoiled, or with `with_root`: P⁻¹
  bool of_rows = true;  ///< of X's rows; else ZᵀZ of its columns, and D = XQ
  int exponent = 0;     ///< Z was scaled by 2^-exponent
  bool with_root = false;
  std::span<const MatrixView> state = {};  ///< as `Whole::state`
  double phase = 0;
  std::string* problem = nullptr;
  MatrixView q = {};               ///< out; as large as r, f32
  std::span<double> squares = {};  ///< out: Σ of squares of each line of D; may be empty
};

/// What a direction asks of the group's `lmo`.
enum class LmoUse : std::uint8_t { all, scale, none };

/// Here D = lmo(X). Others derive from it.
class Direction {
 public:
  virtual ~Direction() = default;

  [[nodiscard]] virtual LmoUse lmo_use() const { return LmoUse::all; }
  /// s of a rows×cols matrix: 1 without use of an LMO.
  [[nodiscard]] double scale(const Lmo& lmo, Index rows, Index cols) const;

  /// Is it made of G, too? Then that meets beside X.
  [[nodiscard]] virtual bool asks_for_gradient() const { return false; }
  /// What keeps a rows×cols matrix from `mode`; empty: nothing. @param of_rows  as in `GramForm`.
  [[nodiscard]] virtual std::string obstacle(Mode, Index /*rows*/, Index /*cols*/, bool /*of_rows*/,
                                             bool /*with_root*/) const {
    return {};
  }
  /// May X and G be rounded to bf16 on their way, each for itself? (SOAP divides X by what G has
  /// been in the same direction: by nothing where rounding has parted them.)
  [[nodiscard]] virtual bool takes_bf16() const { return true; }
  /// Does it count as a matrix orthogonalized?
  [[nodiscard]] virtual bool orthogonalizes(const Lmo& lmo) const;
  /// Does the host wait for a device?
  [[nodiscard]] virtual bool waits(const Lmo& lmo, Index side) const;
  /// Nominal flops of a step; of products that take as long: eigenvectors are slower.
  [[nodiscard]] virtual double flops(const Lmo& lmo, Index rows, Index cols) const;
  [[nodiscard]] virtual double product_flops(const Lmo& lmo, Index rows, Index cols) const {
    return flops(lmo, rows, cols);
  }
  /// "polar_express_101, 5 iterations". @param side  the shorter.
  [[nodiscard]] virtual std::string description(const Lmo& lmo, Index side) const;

  [[nodiscard]] virtual std::size_t workspace_bytes(const Lmo& lmo, Index rows, Index cols) const;
  /// X ← D. @param work  `workspace_bytes`, 64-byte aligned.
  /// @throws NumericError  it cannot be made.
  virtual void make(const Whole& m, const Lmo& lmo, const StepScalars& s, std::span<std::byte> work,
                    kernels::Backend& backend) const;

  // ECO: X = P⁻¹D.
  /// Is D linear in X? Else a larger momentum takes no longer step.
  [[nodiscard]] virtual bool is_linear() const { return false; }
  /// What keeps P from having an inverse; empty: nothing.
  [[nodiscard]] virtual std::string undo_obstacle() const { return {}; }
  /// Bytes of P⁻¹, and scratch of what makes and applies it; no less than `workspace_bytes`.
  [[nodiscard]] virtual std::size_t root_bytes(const Lmo& lmo, Index rows, Index cols) const;
  [[nodiscard]] virtual std::size_t root_workspace_bytes(const Lmo& lmo, Index rows,
                                                         Index cols) const;
  /// X ← D, with the P⁻¹ of it.
  virtual void make_with_root(const Whole& m, const Lmo& lmo, const StepScalars& s,
                              std::span<std::byte> root, std::span<std::byte> work,
                              kernels::Backend& backend) const;
  /// C ← P⁻¹E. @param root  spoiled. @param state  as `make_with_root` left it. @param c  not `e`.
  virtual void undo(const Lmo& lmo, const StepScalars& s, std::span<std::byte> root,
                    std::span<const MatrixView> state, ConstMatrixView e, MatrixView c,
                    std::span<std::byte> work, kernels::Backend& backend) const;

  // Mode gram.
  [[nodiscard]] virtual Stack stack(Index /*rows*/, Index /*cols*/) const { return Stack::x; }
  /// G ← Y. @param x  X of the same piece.
  virtual void companion(ConstMatrixView /*x*/, MatrixView /*g*/, const StepScalars&,
                         kernels::Backend&) const {}
  /// Is Q symmetric? Else all of D is made by its first rows.
  [[nodiscard]] virtual bool has_symmetric_gram() const { return true; }
  /// Is that accurate in f32, with R of this side?
  [[nodiscard]] virtual bool has_gram_form(const Lmo& lmo, Index side) const;
  /// Are Gram matrices to be summed in f64 on their rank?
  [[nodiscard]] virtual bool sums_in_f64(const Lmo& lmo) const;
  /// Is Q the LMO's, so that ranks may share its terms?
  [[nodiscard]] virtual bool has_lmo_gram() const { return true; }
  [[nodiscard]] virtual double gram_flops(const Lmo& lmo, Index side) const;
  [[nodiscard]] virtual double gram_product_flops(const Lmo& lmo, Index side) const {
    return gram_flops(lmo, side);
  }
  [[nodiscard]] virtual std::size_t gram_workspace_bytes(const Lmo& lmo, Index side,
                                                         bool with_root) const;
  virtual void gram(const GramForm& form, const Lmo& lmo, const StepScalars& s,
                    std::span<std::byte> work, kernels::Backend& backend) const;

  // Mode block_cyclic.
  /// Is it an inverse root times X there (`BlockCyclicRoot`)? Its first two states of the matrix
  /// are a factor and its root. Else it is the LMO's of Z.
  [[nodiscard]] virtual bool has_grid_root() const { return false; }
  [[nodiscard]] virtual GridRoot grid_root(const StepScalars& s) const;
  /// Says what went wrong, on all ranks alike. @throws NumericError  as `make`.
  virtual void settle(const GridRootReport& report, const Whole& m,
                      kernels::Backend& backend) const;
};

/// lmo(X).
const Direction& lmo_direction();

}  // namespace orthrus::optim
