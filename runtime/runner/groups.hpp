#pragma once
/// @file
/// Which ranks of a job make a group that runs a trial.

#include <string>
#include <vector>

namespace orthrus::runner {

/// Groups of `size` ranks of one node each; of several nodes, whole ones as far as they go, where
/// no node has that many. Ranks that are left over are in no group.
/// @param nodes  of every rank, by name
/// @param first  the first rank that may be in a group: those before it only schedule
/// @param most   groups; 0: as many as there is room for
/// @return of every rank the number of its group, ascending with their least ranks; -1: none
[[nodiscard]] std::vector<int> groups_of(const std::vector<std::string>& nodes, int size, int first,
                                         int most);

}  // namespace orthrus::runner
