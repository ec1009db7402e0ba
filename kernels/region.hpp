#pragma once
/// @file
/// Region: where a piece lies in a larger row-major tensor.

#include <orthrus/view.hpp>

namespace orthrus {

/// Rows of elements at equal distances in the row-major order of a tensor: a block of a matrix, or
/// a run of elements.
struct Region {
  Index first = 0;  ///< flat element of the first row
  Index rows = 1, cols = 0;
  Index distance = 0;  ///< flat elements between rows
  [[nodiscard]] Index size() const noexcept { return rows * cols; }
  friend bool operator==(const Region&, const Region&) = default;
};

}  // namespace orthrus
