#pragma once
/// @file
/// Matrix function: what a mode does with one matrix, once its pieces have met.
///
/// A mode says where the pieces of a matrix meet for its LMO (runtime/placement chooses it,
/// runtime/meeting moves the pieces). The mathematics is here.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <orthrus/view.hpp>
#include <span>
#include <string_view>

namespace orthrus::kernels {
class Backend;
}

namespace orthrus::optim {
class Lmo;
class MatrixRule;
struct StepScalars;
struct Whole;

/// Where the pieces of a matrix meet. Sizes and costs: runtime/README.md.
enum class Mode : std::uint8_t {
  owner,         ///< the whole matrix rests on one rank: nothing travels
  exchange,      ///< pieces to an owner and the result back
  gather,        ///< every rank gets the whole matrix and computes it
  gram,          ///< only the Gram matrix meets: packed triangles summed, its polynomial comes back
  gram_steps,    ///< the same in every iteration
  block_cyclic,  ///< pieces to a process grid that computes together
  block_local,   ///< nothing: every piece is a matrix of its own. Another update rule
  periodic       ///< `exchange` every so many steps, `block_local` between. Another update rule
};

inline constexpr std::size_t mode_count = 8;

constexpr std::string_view name_of(Mode mode) noexcept {
  constexpr std::string_view names[mode_count] = {"owner",       "exchange",   "gather",
                                                  "gram",        "gram_steps", "block_cyclic",
                                                  "block_local", "periodic"};
  return names[static_cast<std::size_t>(mode)];
}
std::optional<Mode> mode_named(std::string_view name);

/// Does the mode give the bits of one rank, given the same gradient?
constexpr bool is_bitwise(Mode mode) noexcept {
  return mode == Mode::owner || mode == Mode::exchange || mode == Mode::gather;
}
/// Does each rank keep a piece of the matrix?
constexpr bool is_sharded(Mode mode) noexcept { return mode != Mode::owner; }
/// Does the Gram matrix travel, of the side no rank's piece cuts?
constexpr bool uses_gram(Mode mode) noexcept {
  return mode == Mode::gram || mode == Mode::gram_steps;
}
/// Does every rank compute the whole LMO?
constexpr bool is_full_update(Mode mode) noexcept {
  return mode != Mode::block_local && mode != Mode::periodic;
}

/// Scratch of `whole_matrix` for a rows×cols matrix, in bytes.
std::size_t whole_matrix_workspace_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows,
                                         Index cols);
/// X ← D, an LMO by `Backend::replay` where nothing is waited for; its lines then scaled as the
/// rule wants them.
void whole_matrix(const MatrixRule& rule, const Lmo& lmo, const Whole& m, const StepScalars& s,
                  std::span<std::byte> work, kernels::Backend& backend);

/// ECO: what undoes a whole matrix's direction F·D, F the factors of its lines.
struct Undo {
  std::span<std::byte> root;     ///< `Direction::root_bytes`
  std::span<std::byte> factors;  ///< a double per line that the rule scales
};
/// Bytes of both, each at a multiple of 256.
std::size_t undo_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols);
/// Cuts them off the front of `work`.
Undo carve_undo(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols,
                std::span<std::byte>& work);
/// `whole_matrix`, which also leaves what undoes it. @param work  `undo_workspace_bytes`.
void whole_matrix_with_undo(const MatrixRule& rule, const Lmo& lmo, const Whole& m,
                            const StepScalars& s, const Undo& undo, std::span<std::byte> work,
                            kernels::Backend& backend);
/// C ← P⁻¹F⁻¹E: the change of X that FD would answer with E, but for its being as long as it is.
/// @param m  x: E, spoiled where the rule scales lines; state: as it was left. @param c  f32.
void undo_matrix(const MatrixRule& rule, const Lmo& lmo, const Undo& undo, const Whole& m,
                 const StepScalars& s, MatrixView c, std::span<std::byte> work,
                 kernels::Backend& backend);
/// f ← 1/f of a double per line; 0 of a line that was none.
void invert_factors(double* factors, Index count, kernels::Backend& backend);
/// Scratch of both.
std::size_t undo_workspace_bytes(const MatrixRule& rule, const Lmo& lmo, Index rows, Index cols);

/// sums: Σ D² of each line of a direction, in; what multiplies the line, out.
/// @param state   the rule's, of which the one per line takes the sums in.
/// @param length  elements of a line.
/// @par Cost  nothing beside; on a device that the host does not follow, copies there and back.
void scale_factors(const MatrixRule& rule, std::span<const MatrixView> state, Index length,
                   std::span<double> sums, kernels::Backend& backend);

}  // namespace orthrus::optim
