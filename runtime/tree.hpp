#pragma once
/// @file
/// The fixed binary tree of reproducible sums: [a, b) splits at a + the largest power of two below
/// b − a. A sum over leaves 0 … V−1 taken along it has the same bits however the leaves are dealt
/// to ranks.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <orthrus/dtype.hpp>
#include <vector>

namespace orthrus::runtime {

/// Leaves [begin, end).
struct Leaves {
  Index begin = 0, end = 0;
  [[nodiscard]] constexpr Index size() const noexcept { return end - begin; }
  friend constexpr bool operator==(const Leaves&, const Leaves&) = default;
};

/// Where the node splits. @pre n.size() >= 2.
constexpr Index tree_split(Leaves n) noexcept {
  return n.begin + static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(n.size() - 1)));
}

/// Is `n` a node of the tree over `leaves` leaves?
constexpr bool is_tree_node(Index leaves, Leaves n) noexcept {
  Leaves at{0, leaves};
  while (at != n) {
    if (at.size() < 2 || n.begin < at.begin || n.end > at.end || n.size() >= at.size())
      return false;
    const Index s = tree_split(at);
    if (n.end <= s) {
      at.end = s;
    } else if (n.begin >= s) {
      at.begin = s;
    } else {
      return false;
    }
  }
  return true;
}

/// May neighbours x, y be added? (Then the sum is the node they form.)
constexpr bool are_tree_siblings(Index leaves, Leaves x, Leaves y) noexcept {
  const Leaves parent{x.begin, y.end};
  return x.end == y.begin && tree_split(parent) == x.end && is_tree_node(leaves, parent);
}

/// The leaves of `rank` when `leaves` are dealt to `ranks` ranks in contiguous runs, the first
/// ranks getting one more; ranks beyond the leaves get none.
constexpr Leaves leaf_run(Index leaves, int ranks, int rank) noexcept {
  const Index each = leaves / ranks;
  const Index more = leaves % ranks;
  const Index begin = rank * each + (rank < more ? rank : more);
  return {begin, begin + each + (rank < more ? 1 : 0)};
}

/// What is left when `run` has been summed as far as the tree allows: the roots of its complete
/// subtrees.
/// @param[out] depth  the most partial sums held at any time.
inline std::vector<Leaves> subtree_roots(Index leaves, Leaves run, int* depth = nullptr) {
  std::vector<Leaves> stack;
  int most = 0;
  for (Index leaf = run.begin; leaf < run.end; ++leaf) {
    stack.push_back({leaf, leaf + 1});
    most = std::max(most, static_cast<int>(stack.size()));
    while (stack.size() >= 2 && are_tree_siblings(leaves, stack[stack.size() - 2], stack.back())) {
      const Index end = stack.back().end;
      stack.pop_back();
      stack.back().end = end;
    }
  }
  if (depth != nullptr) *depth = most;
  return stack;
}

}  // namespace orthrus::runtime
