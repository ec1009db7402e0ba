#pragma once
/// @file
/// From the nodes of a study file to a Study.

#include <string>

#include "runtime/runner/study_file.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runner {

/// @param source  the file's name
/// @throws ConfigError  `file:line:column: key.path: what, and a hint`; all that is wrong at once.
[[nodiscard]] Study read_study(const runtime::YamlNode& root, const std::string& source);

}  // namespace orthrus::runner
