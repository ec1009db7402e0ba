#include "kernels/triangle.hpp"

#include <algorithm>
#include <array>

#include "kernels/check.hpp"

namespace orthrus::kernels {
namespace {

template <class T>
T* row(MatrixView v, Index i) {
  return static_cast<T*>(v.data) + i * v.ld;
}

/// Through tiles of whole cache lines: where ld is a power of two, the lines of a column evict each
/// other.
template <class T>
void mirror(MatrixView c) {
  constexpr Index tile = 16;
  std::array<T, tile * tile> turned;
  for (Index bi = 0; bi < c.rows; bi += tile) {
    const Index rows = std::min(tile, c.rows - bi);
    for (Index bj = 0; bj <= bi; bj += tile) {
      const Index cols = std::min(tile, c.rows - bj);
      for (Index i = 0; i < rows; ++i) {
        const T* from = row<T>(c, bi + i) + bj;
        for (Index j = 0; j < cols; ++j) turned[static_cast<std::size_t>(j * tile + i)] = from[j];
      }
      for (Index j = 0; j < cols; ++j) {
        const Index first = bi == bj ? j + 1 : 0;
        std::copy(turned.data() + j * tile + first, turned.data() + j * tile + rows,
                  row<T>(c, bj + j) + bi + first);
      }
    }
  }
}

}  // namespace

void pack_triangle(ConstMatrixView full, float* packed) {
  check_triangle("pack_triangle", full);
  for (Index i = 0; i < full.rows; ++i) {
    packed = std::copy_n(static_cast<const float*>(full.data) + i * full.ld, i + 1, packed);
  }
}

void unpack_triangle(const float* packed, MatrixView full) {
  check_triangle("unpack_triangle", full);
  for (Index i = 0; i < full.rows; ++i) {
    std::copy_n(packed + packed_size(i), i + 1, row<float>(full, i));
  }
  mirror<float>(full);
}

void mirror_lower(MatrixView c) {
  check_square("mirror_lower", c);
  if (c.dtype == DType::f32) return mirror<float>(c);
  if (c.dtype == DType::f64) return mirror<double>(c);
  mirror<BFloat16>(c);
}

}  // namespace orthrus::kernels
