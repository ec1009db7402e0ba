#pragma once
/// @file
/// What no single key of a study file can see: keys that exclude or need each other.

#include <string>
#include <utility>
#include <vector>

#include "runtime/runner/study_file.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {

/// Parameters that `search.keep` derives, and where it says so.
using Kept = std::vector<std::pair<runtime::Origin, std::string>>;

/// @return `file:line:column: key.path: what` for all that is wrong; none: nothing is
[[nodiscard]] std::vector<std::string> conflicts_of(const Study& study, const Kept& kept,
                                                    const runtime::YamlNode& root);

}  // namespace orthrus::runner
