#pragma once
/// @file
/// Codes and scales of a trainer that computes with them: how large they are, how they are made of
/// f32 weights, and what they stand for. For memory of the host.

#include <orthrus/config.hpp>
#include <orthrus/quantized.hpp>
#include <orthrus/view.hpp>

namespace orthrus {

/// The grid of a group's weights; nothing where `weights.format` is f32 or bf16.
std::optional<Grid> grid_of(const WeightsConfig& weights);

/// Bytes and floats of a rows×cols matrix, as `Parameter::codes` and `Parameter::scales` have them.
constexpr Index code_bytes(const Grid& grid, Index rows, Index cols) noexcept {
  return rows * code_pitch(grid.format, cols);
}
constexpr Index scale_count(const Grid& grid, Index rows, Index cols) noexcept {
  return scale_rows(grid, rows) * scale_cols(grid, cols);
}

/// The view of such buffers.
constexpr QuantizedView quantized_view(void* codes, float* scales, const Grid& grid, Index rows,
                                       Index cols) noexcept {
  const bool shared = grid.extent == Grid::Extent::tensor;
  return {codes, code_pitch(grid.format, cols), scales, shared ? 0 : scale_cols(grid, cols), rows,
          cols};
}

/// Rows first … first + count − 1 of a matrix.
inline QuantizedView rows_of(const QuantizedView& q, Index first, Index count) noexcept {
  return {static_cast<std::byte*>(q.codes) + first * q.pitch,
          q.pitch,
          q.scales + first * q.scale_pitch,
          q.scale_pitch,
          count,
          q.cols};
}

/// Codes and scales of w, rounded to the nearest as the optimizer rounds what it is constructed
/// with: scale = max(largest magnitude / largest code, 1e-12), or the power of two above.
/// Rows may be made a panel at a time, except where one scale is of all (Extent::tensor).
/// @param      w       f32 or bf16; only read.
/// @param[out] q       as many rows and columns.
/// @param[out] maxima  f32, `scale_rows` × `scale_cols`: the largest magnitudes; empty: not wanted.
/// @throws ShapeError  views do not fit each other. NumericError  w is not finite.
/// @par Cost  memory of a few rows of f32 (Extent::tensor too)
void quantize(ConstMatrixView w, const Grid& grid, QuantizedView q, MatrixView maxima = {});

/// to ← code · scale, in f32 (rounded once) or bf16 (from there once).
/// @throws ShapeError  views do not fit each other.
void dequantize(ConstQuantizedView q, const Grid& grid, MatrixView to);

}  // namespace orthrus
