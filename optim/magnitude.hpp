#pragma once
/// @file
/// Products with magnitudes, which undo sign().

#include "kernels/backend.hpp"

namespace orthrus::optim {

/// y ← |x|⊙y, in runs of one row. @param x  f32, spoiled. @param wide  scratch, x.size() doubles.
inline void multiply_by_magnitude(MatrixView x, MatrixView y, double* wide,
                                  kernels::Backend& backend) {
  const MatrixView factors = matrix_view(wide, 1, x.size());
  for (const bool sign : {false, true}) {
    if (sign) backend.sign(x, x);
    backend.convert(x, 1, factors);
    backend.scale_lines(factors, /*of_columns=*/true, y);
  }
}

}  // namespace orthrus::optim
