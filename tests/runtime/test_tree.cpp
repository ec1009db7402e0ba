// The fixed tree of reproducible sums.
#include <gtest/gtest.h>

#include "runtime/tree.hpp"

namespace orthrus::runtime {
namespace {

TEST(Tree, SplitsAtTheLargestPowerOfTwoBelow) {
  EXPECT_EQ(tree_split({0, 8}), 4);
  EXPECT_EQ(tree_split({0, 7}), 4);
  EXPECT_EQ(tree_split({4, 7}), 6);
  EXPECT_EQ(tree_split({3, 5}), 4);
  static_assert(is_tree_node(8, {4, 6}) && !is_tree_node(8, {3, 5}) && is_tree_node(7, {4, 7}));
}

TEST(Tree, RunsCoverTheLeavesInOrder) {
  for (int ranks = 1; ranks <= 11; ++ranks) {
    Index next = 0;
    for (int r = 0; r < ranks; ++r) {
      const Leaves run = leaf_run(8, ranks, r);
      EXPECT_EQ(run.begin, next);
      next = run.end;
    }
    EXPECT_EQ(next, 8);
  }
}

/// The definition, top down.
float sum_of(const std::vector<float>& x, Leaves n) {
  if (n.size() == 1) return x[static_cast<std::size_t>(n.begin)];
  const Index s = tree_split(n);
  return sum_of(x, {n.begin, s}) + sum_of(x, {s, n.end});
}

TEST(Tree, SumsOfRunsMergeToTheBitsOfTheWholeTree) {
  for (Index v = 1; v <= 19; ++v) {
    std::vector<float> x;
    for (Index i = 0; i < v; ++i) x.push_back(1.0F / static_cast<float>(3 * i + 1));
    const float expected = sum_of(x, {0, v});
    for (int ranks = 1; ranks <= 6; ++ranks) {
      std::vector<Leaves> nodes;
      std::vector<float> sums;
      for (int r = 0; r < ranks; ++r) {
        int depth = 0;
        for (const Leaves n : subtree_roots(v, leaf_run(v, ranks, r), &depth)) {
          EXPECT_TRUE(is_tree_node(v, n));
          nodes.push_back(n);
          sums.push_back(sum_of(x, n));
          while (nodes.size() >= 2 && are_tree_siblings(v, nodes[nodes.size() - 2], nodes.back())) {
            sums[sums.size() - 2] += sums.back();
            nodes[nodes.size() - 2].end = nodes.back().end;
            nodes.pop_back();
            sums.pop_back();
          }
        }
      }
      ASSERT_EQ(sums.size(), 1U) << v << " leaves on " << ranks;
      EXPECT_EQ(sums[0], expected);
    }
  }
}

TEST(Tree, ARunKeepsFewPartialSums) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    for (int r = 0; r < ranks; ++r) {
      int depth = 0;
      const auto roots = subtree_roots(64, leaf_run(64, ranks, r), &depth);
      EXPECT_LE(depth, 2 * 6 + 1);  // two flanks of at most log2(64) nodes, and the leaf at hand
      EXPECT_GE(depth, static_cast<int>(roots.size()));
    }
  }
}

}  // namespace
}  // namespace orthrus::runtime
