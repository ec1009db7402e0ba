#pragma once
/// @file
/// mirror_lower: the upper triangle of a symmetric matrix from its lower one.

#include <algorithm>
#include <array>
#include <orthrus/view.hpp>

namespace orthrus::kernels {

/// Copies what is below the diagonal above it, through tiles of whole cache lines: where ld is a
/// power of two, the lines of a column evict each other.
template <class T>
void mirror_lower(MatrixView c) {
  constexpr Index tile = 16;
  std::array<T, tile * tile> turned;
  const auto row = [&](Index i) { return static_cast<T*>(c.data) + i * c.ld; };
  for (Index bi = 0; bi < c.rows; bi += tile) {
    const Index rows = std::min(tile, c.rows - bi);
    for (Index bj = 0; bj <= bi; bj += tile) {
      const Index cols = std::min(tile, c.rows - bj);
      for (Index i = 0; i < rows; ++i) {
        const T* from = row(bi + i) + bj;
        for (Index j = 0; j < cols; ++j) turned[static_cast<std::size_t>(j * tile + i)] = from[j];
      }
      for (Index j = 0; j < cols; ++j) {
        const Index first = bi == bj ? j + 1 : 0;
        std::copy(turned.data() + j * tile + first, turned.data() + j * tile + rows,
                  row(bj + j) + bi + first);
      }
    }
  }
}

}  // namespace orthrus::kernels
