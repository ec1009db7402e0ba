#include "runtime/runner/groups.hpp"

#include <algorithm>

namespace orthrus::runner {

std::vector<int> groups_of(const std::vector<std::string>& nodes, int size, int first, int most) {
  // Ranks by node, nodes in the order in which they appear.
  std::vector<std::string> names;
  std::vector<std::vector<int>> of_node;
  for (int rank = first; rank < static_cast<int>(nodes.size()); ++rank) {
    const std::string& name = nodes[static_cast<std::size_t>(rank)];
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) {
      names.push_back(name);
      of_node.push_back({rank});
    } else {
      of_node[static_cast<std::size_t>(found - names.begin())].push_back(rank);
    }
  }
  const auto wanted = static_cast<std::size_t>(size);
  if (std::none_of(of_node.begin(), of_node.end(),
                   [wanted](const std::vector<int>& ranks) { return ranks.size() >= wanted; })) {
    std::vector<int> all;
    for (const std::vector<int>& ranks : of_node) all.insert(all.end(), ranks.begin(), ranks.end());
    of_node = {std::move(all)};
  }
  std::vector<std::vector<int>> groups;
  for (const std::vector<int>& ranks : of_node) {
    for (std::size_t at = 0; at + wanted <= ranks.size(); at += wanted) {
      groups.emplace_back(ranks.begin() + static_cast<std::ptrdiff_t>(at),
                          ranks.begin() + static_cast<std::ptrdiff_t>(at + wanted));
    }
  }
  const auto least = [](const std::vector<int>& g) {
    return *std::min_element(g.begin(), g.end());
  };
  std::sort(groups.begin(), groups.end(),
            [&](const auto& a, const auto& b) { return least(a) < least(b); });
  if (most > 0 && groups.size() > static_cast<std::size_t>(most))
    groups.resize(static_cast<std::size_t>(most));
  std::vector<int> out(nodes.size(), -1);
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (const int rank : groups[g]) out[static_cast<std::size_t>(rank)] = static_cast<int>(g);
  }
  return out;
}

}  // namespace orthrus::runner
