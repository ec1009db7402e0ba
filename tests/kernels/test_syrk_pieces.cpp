// How CUDA takes a symmetric product apart. Needs no device.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda/syrk_pieces.hpp"

namespace orthrus::kernels::cuda {
namespace {

struct Cover {
  std::vector<int> times;
  double entries = 0;
  int products = 0;
  bool inside = true;
};

Cover cover(Index n, Index leaf) {
  Cover result;
  result.times.assign(static_cast<std::size_t>(n * n), 0);
  for_each_syrk_piece(n, leaf, [&](const SyrkPiece& p) {
    ++result.products;
    for (Index b = 0; b < p.count; ++b) {
      const Index row = p.row + b * p.step;
      const Index col = p.col + b * p.step;
      result.inside = result.inside && row + p.rows <= n && col + p.cols <= n;
      for (Index i = row; i < std::min(row + p.rows, n); ++i) {
        for (Index j = col; j < std::min(col + p.cols, n); ++j) {
          ++result.times[static_cast<std::size_t>(i * n + j)];
          ++result.entries;
        }
      }
    }
  });
  return result;
}

TEST(SyrkPieces, CoverTheLowerTriangleOnce) {
  for (const Index leaf : {1, 2, 3, 8}) {
    for (Index n = 1; n <= 70; ++n) {
      const Cover c = cover(n, leaf);
      EXPECT_TRUE(c.inside) << n << " by " << leaf;
      for (Index i = 0; i < n; ++i) {
        for (Index j = 0; j < n; ++j) {
          const int times = c.times[static_cast<std::size_t>(i * n + j)];
          if (j <= i) {
            ASSERT_EQ(times, 1) << n << " by " << leaf << ": " << i << "," << j;
          } else {  // the blocks on the diagonal are whole
            ASSERT_EQ(times, i / leaf == j / leaf ? 1 : 0) << n << " by " << leaf;
          }
        }
      }
    }
  }
}

TEST(SyrkPieces, AreFewAndLittleMoreThanHalf) {
  const Cover c = cover(64, 8);
  EXPECT_EQ(c.products, 4);  // 8 on the diagonal, then 4, 2 and 1
  EXPECT_EQ(c.entries, 64 * 64 * (1 + 1.0 / 8) / 2);
  EXPECT_EQ(cover(7, 7).products, 1);
}

// Blocks begin at multiples of 16 bytes of bf16, so that no piece needs packing.
TEST(SyrkPieces, BeginAligned) {
  for (Index n = 1; n < 20000; n += 37) {
    const Index leaf = syrk_leaf(n);
    EXPECT_TRUE(leaf == n || leaf % 128 == 0) << n;
    EXPECT_LE(n, 8 * leaf) << n;
  }
}

}  // namespace
}  // namespace orthrus::kernels::cuda
