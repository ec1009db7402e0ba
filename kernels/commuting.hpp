#pragma once
/// @file
/// Products of symmetric matrices that commute: symmetric again, so half of one says what all of it
/// is.

#include <algorithm>
#include <cstddef>
#include <orthrus/view.hpp>
#include <span>
#include <type_traits>

#include "kernels/carve.hpp"

namespace orthrus::kernels {
class Backend;

/// The rows×cols block at (i, j).
template <class View>
View block(View v, Index i, Index j, Index rows, Index cols) {
  using Byte = std::conditional_t<std::is_same_v<View, MatrixView>, std::byte, const std::byte>;
  const Index at = (i * v.ld + j) * static_cast<Index>(bytes_of(v.dtype));
  return {static_cast<Byte*>(v.data) + at, rows, cols, v.ld, v.dtype};
}

/// The first rows and columns of a panel, taken to hold another type.
inline MatrixView part(MatrixView panel, Index rows, Index cols, DType dtype) {
  return {panel.data, rows, cols, panel.ld, dtype};
}

/// Rows that are multiplied at once. More rows: better products, but more work on the diagonal and
/// more scratch.
constexpr Index panel_rows(Index m) { return std::min<Index>(m, m < 2048 ? 128 : 256); }
constexpr std::size_t panel_bytes(Index m) { return piece_bytes(panel_rows(m), m, DType::f64); }

/// Two panels of f64, each as long as the side.
struct Panels {
  MatrixView left, out;

  Panels(Index m, std::span<std::byte>& work)
      : left(carve(work, panel_rows(m), m, DType::f64)),
        out(carve(work, panel_rows(m), m, DType::f64)) {}
};

/// C ← α·AB + β·A in B's type, for symmetric A and B that commute: the lower triangle, mirrored. C
/// may be A, not B: a panel of A is saved before the same rows of C are written. @par Cost  m³
/// flops and m² times the rows of a panel.
void commuting_product(double alpha, ConstMatrixView a, ConstMatrixView b, double beta,
                       MatrixView c, const Panels& panels, Backend& backend);

}  // namespace orthrus::kernels
