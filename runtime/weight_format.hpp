#pragma once
/// @file
/// WeightFormat: how the weights of a group rest between steps, and travel: elements of a dtype, or
/// codes and scales.

#include <optional>
#include <orthrus/config.hpp>
#include <orthrus/dtype.hpp>
#include <orthrus/quantized.hpp>
#include <orthrus/view.hpp>
#include <string>
#include <string_view>

#include "kernels/region.hpp"

namespace orthrus::runtime {

/// What becomes of what rounding takes from the weights (`weights.residual`).
enum class Residual : std::uint8_t {
  none,      ///< forgotten
  momentum,  ///< pulled back into the momentum (ECO)
  master,    ///< f32 weights are kept beside
  mantissa   ///< bf16: the low 16 bits are kept beside, which is all of it
};

struct WeightFormat {
  DType dtype = DType::f32;  ///< of elements, where there is no grid
  std::optional<Grid> grid;

  [[nodiscard]] bool quantized() const noexcept { return grid.has_value(); }
  /// What its pieces are counted in on the wire: elements, or bytes.
  [[nodiscard]] DType unit() const noexcept { return quantized() ? DType::u8 : dtype; }
  /// Units of a rows×cols piece. Quantized: codes row after row, up to a multiple of 4 bytes, then
  /// scales.
  [[nodiscard]] Index units(Index rows, Index cols) const noexcept;
  [[nodiscard]] std::size_t bytes(Index rows, Index cols) const noexcept {
    return static_cast<std::size_t>(units(rows, cols)) * bytes_of(unit());
  }
  /// Codes row after row, and their scales. @pre quantized
  [[nodiscard]] QuantizedView view(void* codes, float* scales, Index rows,
                                   Index cols) const noexcept;
  /// Such a piece. @pre quantized, `piece` is a multiple of 4
  [[nodiscard]] QuantizedView view(void* piece, Index rows, Index cols) const noexcept;
  [[nodiscard]] Index scale_count(Index rows, Index cols) const noexcept {
    return quantized() ? scale_rows(*grid, rows) * scale_cols(*grid, cols) : 0;
  }
  /// The scales of `piece` among those of a parameter whose rows are `line` long, row-major.
  /// @pre quantized
  [[nodiscard]] Region scale_region(const Region& piece, Index line) const noexcept;

  /// "bf16", "fp8_e4m3/row", "int4/block32/pow2".
  [[nodiscard]] std::string name() const;
  /// The inverse of `name`.
  static std::optional<WeightFormat> named(std::string_view name);

  friend bool operator==(const WeightFormat&, const WeightFormat&) = default;
};

WeightFormat weight_format(const WeightsConfig& config);
/// How a momentum rests: f32, bf16, or int8 with scales of blocks.
WeightFormat momentum_format(const StateConfig& config);
/// Is it one that a momentum may have?
bool is_of_momentum(const WeightFormat& format);
/// Entries of at most `bound` are no larger than this, however they have been rounded to `format`:
/// it is a number that bf16 has, which nothing below is rounded beyond, and of which as a block's
/// largest no int8 code · scale is more (127·(b/127) ≤ b in f32, of all 128 mantissas). So a bound
/// that comes back to itself does not grow. f32: `bound`.
double bound_at_rest(const WeightFormat& format, double bound);
Residual residual_of(const WeightsConfig& config);

/// A block of a quantized matrix; with Extent::block `col` begins a block.
QuantizedView block(const QuantizedView& v, const Grid& grid, Index row, Index rows, Index col,
                    Index cols) noexcept;
/// Does every code in a byte stand for a number that rounding makes? Not NaN, Inf, int8's −128,
/// int4's −8.
bool are_numbers(CodeFormat format, std::uint8_t byte) noexcept;
/// Of a parameter's codes and scales, those of a region of it: whole rows, or columns of them that
/// begin a byte and, with Extent::block, a block.
inline QuantizedView block(const QuantizedView& whole, const Grid& grid, const Region& r) noexcept {
  return block(whole, grid, r.first / whole.cols, r.rows, r.first % whole.cols, r.cols);
}
/// Does a region lie in a matrix, and share no scale with what is left and right of it in another
/// block? (What comes from a file may be anything inside its tensor.)
bool is_block(const Grid& grid, const QuantizedView& whole, const Region& r) noexcept;
/// Codes and scales of a piece, on the host, become those of a region of a whole matrix whose rows
/// are as long as the region's distances: also where that begins in the middle of a byte.
void put_piece(const ConstQuantizedView& piece, const Grid& grid, const Region& region,
               const QuantizedView& whole) noexcept;
/// The scales of a quantized matrix as a matrix.
inline MatrixView scales_of(const QuantizedView& v, const Grid& grid) noexcept {
  const Index rows = scale_rows(grid, v.rows);
  const Index cols = scale_cols(grid, v.cols);
  return {v.scales, rows, cols, v.scale_pitch == 0 ? cols : v.scale_pitch, DType::f32};
}

}  // namespace orthrus::runtime
