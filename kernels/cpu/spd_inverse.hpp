#pragma once
/// @file
/// The inverse of a symmetric positive definite matrix, nearly all of it in products.

#include <algorithm>
#include <array>
#include <orthrus/view.hpp>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/cpu/elementwise.hpp"

namespace orthrus::kernels::cpu {

/// A ← A⁻¹ by Gauss-Jordan steps on blocks of `block` rows; reads and writes the lower triangle,
/// and spoils the upper one.
///
/// With block k of A = LLᵀ and W the block's rows and columns in the rest of A, a step is V = WL⁻ᵀ,
/// A ← A − VVᵀ, W ← VL⁻¹, and −L⁻ᵀL⁻¹ in the block's place; after the last, A holds −A⁻¹. What
/// remains is a Schur complement as in Cholesky's method, and what is done only grows: no
/// cancellation that potrf and potri would not have, and measured the same error. LAPACK's three
/// passes spend half their time in small triangles.
///
/// @param product  `Backend::gemm` for T.
/// @return false, and A spoiled, when a pivot is not a positive number.
/// @par Cost  m³ flops and 4m²·`block`; scratch 2m·`block`.
template <class T, class Product>
bool invert_lower(MatrixView a, std::vector<T>& scratch, Product product) {
  // More rows in a block: more time in triangles; fewer: shallow products.
  constexpr Index block = 48;
  // Rows of A that one product changes; half of their square is waste.
  constexpr Index update = 128;
  const Index m = a.rows;
  const Index width = std::min(block, m);
  if (static_cast<Index>(scratch.size()) < 2 * m * width) {
    scratch.resize(static_cast<std::size_t>(2 * m * width));
  }
  T* const u = scratch.data();
  T* const v = u + m * width;
  const auto row = [&](Index i) { return static_cast<T*>(a.data) + i * a.ld; };
  const auto part = [&](Index i, Index j, Index rows, Index cols) {
    return MatrixView{row(i) + j, rows, cols, a.ld, a.dtype};
  };
  // Columns k … of row j < k are rows of A below the diagonal: they are read and written turned, a
  // cache line of each at a time.
  const auto for_turned = [&](Index k, Index n, auto f) {
    constexpr Index tile = 16;
    for (Index first = 0; first < k; first += tile) {
      const Index last = std::min(first + tile, k);
      for (Index i = 0; i < n; ++i) {
        T* line = row(k + i);
        for (Index j = first; j < last; ++j) f(u[j * n + i], line[j]);
      }
    }
  };
  std::array<double, block * block> upper;
  std::array<double, block * block> inverse;
  std::array<T, block * block> narrowed;

  for (Index k = 0; k < m; k += width) {
    const Index n = std::min(width, m - k);
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j <= i; ++j) {
        upper[static_cast<std::size_t>(j * n + i)] = static_cast<double>(row(k + i)[k + j]);
      }
    }
    if (!invert_factor(upper.data(), inverse.data(), n)) return false;
    std::transform(inverse.begin(), inverse.begin() + n * n, narrowed.begin(),
                   [](double x) { return static_cast<T>(x); });
    const MatrixView x = matrix_view(narrowed.data(), n, n);
    const MatrixView panel = matrix_view(u, m, n);
    const MatrixView turned = matrix_view(v, m, n);

    for_turned(k, n, [](T& to, const T& from) { to = from; });
    std::fill_n(u + k * n, n * n, T{0});
    for (Index i = k + n; i < m; ++i) std::copy_n(row(i) + k, n, u + i * n);
    product(1, panel, Transpose::no, x, Transpose::yes, 0, turned);
    for (Index i = 0; i < m; i += update) {
      const Index rows = std::min(update, m - i);
      product(-1, matrix_view(v + i * n, rows, n), Transpose::no, matrix_view(v, i + rows, n),
              Transpose::yes, 1, part(i, 0, rows, i + rows));
    }
    product(1, turned, Transpose::no, x, Transpose::no, 0, panel);
    for_turned(k, n, [](const T& from, T& to) { to = from; });
    for (Index i = k + n; i < m; ++i) std::copy_n(u + i * n, n, row(i) + k);
    // The square itself in f64: what is no larger than a block is rounded once.
    negative_square(inverse.data(), upper.data(), n);
    for (Index i = 0; i < n; ++i) {
      std::transform(upper.data() + i * n, upper.data() + i * n + i + 1, row(k + i) + k,
                     [](double value) { return static_cast<T>(value); });
    }
  }
  for (Index i = 0; i < m; ++i) {
    std::transform(row(i), row(i) + i + 1, row(i), [](T value) { return -value; });
  }
  return true;
}

}  // namespace orthrus::kernels::cpu
