#pragma once
/// @file
/// Rule: which update. W ← (1 − ηλ)W − ηU, and where U comes from.
///
/// A rule sees one piece at a time: a whole logical matrix (matrix rules) or any run of elements
/// (element-wise rules). It knows neither ranks nor clocks. All views are f32 and of the same
/// shape.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <orthrus/recipe.hpp>
#include <orthrus/view.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "optim/direction.hpp"
#include "optim/eco.hpp"

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {

/// A state tensor: as large as a piece and beside it, or of a whole matrix, with whoever makes its
/// direction. What is of a whole matrix is a column of numbers.
struct StateSpec {
  enum class Extent : std::uint8_t {
    elements,      ///< of a piece
    rows,          ///< one per row
    short_side,    ///< one per line of the shorter side
    left_factor,   ///< of a symmetric rows×rows matrix, as a packed triangle
    right_factor,  ///< cols×cols
    short_factor,  ///< of the shorter side
    left_square,   ///< of any rows×rows matrix
    right_square,
    whole,  ///< one per element
    one
  };
  std::string_view name;
  Extent extent = Extent::elements;
  Index longest = 0;  ///< of a factor or a square: there is none of a longer side; 0: no limit

  [[nodiscard]] bool of_matrix() const noexcept { return extent != Extent::elements; }
  /// Side of the symmetric matrix whose triangle it is; 0: it is none.
  [[nodiscard]] Index triangle_of(Index r, Index c) const noexcept {
    return extent == Extent::left_factor    ? within(r)
           : extent == Extent::right_factor ? within(c)
           : extent == Extent::short_factor ? within(r < c ? r : c)
                                            : 0;
  }
  /// Its shape for a rows×cols piece (of a matrix: for the whole one).
  [[nodiscard]] Index rows(Index r, Index c) const noexcept {
    switch (extent) {
      case Extent::short_side:
        return r < c ? r : c;
      case Extent::left_square:
        return within(r) * within(r);
      case Extent::right_square:
        return within(c) * within(c);
      case Extent::whole:
        return r * c;
      case Extent::one:
        return 1;
      case Extent::elements:
      case Extent::rows:
        return r;
      default: {
        const Index side = triangle_of(r, c);
        return side * (side + 1) / 2;
      }
    }
  }
  [[nodiscard]] Index cols(Index, Index c) const noexcept {
    return extent == Extent::elements ? c : 1;
  }

 private:
  [[nodiscard]] Index within(Index side) const noexcept {
    return longest == 0 || side <= longest ? side : 0;
  }
};

/// The scalars of one step, equal on all ranks.
struct StepScalars {
  std::int64_t step = 1;  ///< t of this piece's updates, from 1
  double lr = 0;          ///< η after schedule and multiplier
  double weight_decay = 0;
};

/// What one rank holds of one parameter.
struct Piece {
  MatrixView weights;   ///< in: W, out: the new W
  MatrixView gradient;  ///< G, the mean; may be used as scratch
  std::span<const MatrixView>
      state;                  ///< in the order of `Rule::state()`, shaped as `StateSpec` says
  std::span<std::byte> work;  ///< at least `Rule::workspace_bytes` of this shape, 64-byte aligned
};

class Rule {
 public:
  virtual ~Rule() = default;
  /// Does U need the whole matrix? Then the step is `accumulate`, the LMO, `apply`; else `update`.
  [[nodiscard]] virtual bool is_matrix_rule() const = 0;
  [[nodiscard]] virtual std::span<const StateSpec> state() const = 0;
  /// Scratch for a rows×cols piece, beside the LMO's.
  [[nodiscard]] virtual std::size_t workspace_bytes(Index, Index) const { return 0; }
  /// How its momentum, the first of its states, comes back to the weights; nothing where it has
  /// none that does.
  [[nodiscard]] virtual std::optional<MomentumGain> gain() const { return std::nullopt; }
};

/// U(i) depends on element i only: any sharding will do.
class ElementwiseRule : public Rule {
 public:
  [[nodiscard]] bool is_matrix_rule() const final { return false; }
  /// @return Σ U². The gradient is left as it was where `pull_back` needs it.
  virtual double update(const Piece& piece, const StepScalars& s,
                        kernels::Backend& backend) const = 0;
  /// Is U linear in the momentum? Else a larger momentum takes no longer step.
  [[nodiscard]] virtual bool is_linear() const { return true; }
  /// ECO: `to` ← `to` + κ·P⁻¹E after `update` of the same piece, E where its weights were.
  /// @param to  the momentum, or what is to become the correction.
  virtual void pull_back(const Piece& piece, double kappa, MatrixView to, const StepScalars& s,
                         kernels::Backend& backend) const = 0;
};

/// Lines of a matrix.
enum class Lines : std::uint8_t { none, rows, columns };

/// U = s·D of a whole matrix, its lines scaled or not. All but the direction and the scaling of
/// lines works on any piece of it.
class MatrixRule : public Rule {
 public:
  [[nodiscard]] bool is_matrix_rule() const final { return true; }
  /// What makes D of X. Here the LMO.
  [[nodiscard]] virtual const Direction& direction() const { return lmo_direction(); }
  /// Takes G into the momentum and leaves in `piece.gradient` the X that D is made of.
  virtual void accumulate(const Piece& piece, const StepScalars& s,
                          kernels::Backend& backend) const = 0;
  /// X once more, from G and the state as `accumulate` left it; neither state is changed.
  virtual void query(const Piece& piece, kernels::Backend& backend) const = 0;
  /// Given ‖M‖ ≤ `before` and ‖G‖ ≤ `gradient`: b with ‖M‖ ≤ b and ‖X‖ ≤ 2b after `accumulate`.
  [[nodiscard]] virtual double bound(double before, double gradient) const = 0;

  /// Which lines of D get a factor of their own (NorMuon).
  [[nodiscard]] virtual Lines scaled_lines(Index, Index) const { return Lines::none; }
  [[nodiscard]] Index line_count(Index rows, Index cols) const {
    const Lines lines = scaled_lines(rows, cols);
    return lines == Lines::none ? 0 : lines == Lines::rows ? rows : cols;
  }
  /// `sums`: Σ D² of each line, in; its factor, out. @param state  the number per line that the
  /// rule keeps. @param length  elements of a line. Both are where the host can follow them:
  /// `scale_factors` (matrix_function.hpp) sees to that.
  virtual void line_factors(MatrixView /*state*/, Index /*length*/,
                            std::span<double> /*sums*/) const {}

  /// W ← (1 − ηλ)W − η·scale·D, D in `piece.gradient`. @return Σ U² (with scale).
  double apply(const Piece& piece, double scale, const StepScalars& s,
               kernels::Backend& backend) const;
};

/// One hyper-parameter of a rule: what the config checks and `orthrus info --rules` prints.
struct RuleKey {
  std::string_view name;
  Value default_value;
  double min = 0, max = 0;  ///< of numbers (and of each of a list), inclusive; ignored otherwise
  std::string_view doc;
  std::vector<std::string_view> words = {};  ///< what a word may be
};

/// The largest decay of a moment whose 1 − βᵗ is divided by.
inline constexpr double below_one = 1 - 1e-9;

/// A row of the table of rules.
struct RuleRow {
  std::string_view name;
  std::string_view doc;  ///< formula and source
  std::vector<RuleKey> keys;
  std::unique_ptr<Rule> (*make)(const RuleConfig&);
  bool matrix;
};

/// Every rule there is.
std::span<const RuleRow> rules();
const RuleRow* find_rule(std::string_view name);
/// @throws ConfigError naming the known rules.
std::unique_ptr<Rule> make_rule(const RuleConfig& config);
/// `config` with every key of the rule it does not name set to its default.
RuleConfig with_defaults(RuleConfig config);
/// @throws ConfigError  it has a fraction.
std::int64_t whole_number(const RuleConfig& config, std::string_view key);

/// Names of all norms an LMO exists for (optim/lmo.cpp) and of all scales.
std::vector<std::string_view> norm_names();
std::vector<std::string_view> scale_names();

}  // namespace orthrus::optim
