#pragma once
/// @file
/// The lower triangle of a symmetric matrix as few, equal products. Pure.

#include <orthrus/dtype.hpp>

namespace orthrus::kernels::cuda {

/// `count` blocks of rows×cols: the first at (row, col), each next one `step` further down and
/// right.
struct SyrkPiece {
  Index row, col, rows, cols, count, step;
};

/// Calls f with pieces that cover the lower triangle of an n×n matrix: the blocks of `leaf` on the
/// diagonal, then, for each size = leaf, 2·leaf, …, the blocks that join two neighbours of that
/// size. Blocks of one size form one batch, what the end of the matrix cuts is a piece of its own;
/// below the diagonal each entry is covered once. With n = 2^L·leaf that is (1 + 2^-L)/2 of the
/// full square in L + 1 products.
template <class F>
void for_each_syrk_piece(Index n, Index leaf, F f) {
  const Index leaves = n / leaf;
  if (leaves > 0) f(SyrkPiece{0, 0, leaf, leaf, leaves, leaf});
  if (const Index rest = n - leaves * leaf; rest > 0) {
    f(SyrkPiece{leaves * leaf, leaves * leaf, rest, rest, 1, 0});
  }
  for (Index size = leaf; size < n; size *= 2) {
    const Index pairs = n / (2 * size);
    if (pairs > 0) f(SyrkPiece{size, 0, size, size, pairs, 2 * size});
    const Index row = (2 * pairs + 1) * size;
    if (row < n) f(SyrkPiece{row, 2 * pairs * size, n - row, size, 1, 0});
  }
}

/// The leaf of an n×n product of bf16. Small matrices are one product: they do not fill the device
/// as it is. Guessed from the tiles (128×128) that one wave of 132 multiprocessors holds; not
/// measured yet.
constexpr Index syrk_leaf(Index n) {
  if (n < 3072) return n;
  const Index eighth = (n + 8 * 128 - 1) / (8 * 128) * 128;
  return eighth < 512 ? 512 : eighth;
}

}  // namespace orthrus::kernels::cuda
