#pragma once
/// @file
/// From the tree of a config to a Config, strictly: each key against its row, then what no single
/// key can see.

#include <orthrus/config.hpp>
#include <string>

#include "runtime/yaml_tree.hpp"

namespace orthrus::runtime::config_file {

/// @param name  becomes `Config::source`.
/// @throws ConfigError  with all that is wrong, not only the first.
Config read_tree(const YamlNode& root, const std::string& name);

}  // namespace orthrus::runtime::config_file
