#pragma once
/// @file
/// Triangle: a symmetric matrix as messages carry it, in host memory. `Backend` has the same for
/// the memory of a device.

#include <orthrus/view.hpp>

namespace orthrus::kernels {

/// Entries of one triangle of an m×m matrix, diagonal included.
constexpr Index packed_size(Index m) { return m * (m + 1) / 2; }
/// packed ← the lower triangle of `full`, row after row: entry (i, j ≤ i) at i(i+1)/2 + j.
/// @param[in]  full    m×m, f32, in host memory, any ld; what is above the diagonal is not read.
/// @param[out] packed  `packed_size(m)` floats.
/// @throws ShapeError  `full` is not square or not f32.
void pack_triangle(ConstMatrixView full, float* packed);
/// The other way; `full` is written whole and is exactly symmetric.
void unpack_triangle(const float* packed, MatrixView full);
/// Copies what is below the diagonal above it.
/// @throws ShapeError  `c` is not square.
void mirror_lower(MatrixView c);

}  // namespace orthrus::kernels
