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

#include "optim/eco.hpp"

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {

/// A state tensor of a piece: as large as the piece, or one number per line of it.
struct StateSpec {
  enum class Extent : std::uint8_t { elements, rows, short_side };
  std::string_view name;
  Extent extent = Extent::elements;

  [[nodiscard]] bool per_line() const noexcept { return extent != Extent::elements; }
  /// Its shape for a rows×cols piece (per line: of a whole matrix).
  [[nodiscard]] Index rows(Index r, Index c) const noexcept {
    return extent == Extent::short_side ? (r < c ? r : c) : r;
  }
  [[nodiscard]] Index cols(Index, Index c) const noexcept {
    return extent == Extent::elements ? c : 1;
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

/// U = s·lmo(X) of a whole matrix, its lines scaled or not. All but the LMO and the scaling of
/// lines works on any piece of it.
class MatrixRule : public Rule {
 public:
  [[nodiscard]] bool is_matrix_rule() const final { return true; }
  /// Takes G into the state and leaves in `piece.gradient` the X that the LMO is asked about.
  virtual void accumulate(const Piece& piece, const StepScalars& s,
                          kernels::Backend& backend) const = 0;
  /// X once more, from G and the state as `accumulate` left it; neither state is changed.
  virtual void query(const Piece& piece, kernels::Backend& backend) const = 0;
  /// Given ‖M‖ ≤ `before` and ‖G‖ ≤ `gradient`: b with ‖M‖ ≤ b and ‖X‖ ≤ 2b after `accumulate`.
  [[nodiscard]] virtual double bound(double before, double gradient) const = 0;

  /// Which lines of lmo(X) get a factor of their own (NorMuon).
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

  /// W ← (1 − ηλ)W − η·scale·D, where D lies in `piece.gradient`. @return Σ U² (with scale).
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

/// Names of all norms an LMO exists for (optim/lmo.cpp) and of all scales.
std::vector<std::string_view> norm_names();
std::vector<std::string_view> scale_names();

}  // namespace orthrus::optim
