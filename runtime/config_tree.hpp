#pragma once
/// @file
/// The tree of a config: file < environment < --set, each value with where it was said.

#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "runtime/yaml_tree.hpp"

namespace orthrus::runtime::config_file {

/// `file`, with the environment and then `overrides` put into it.
/// @throws ConfigError  also for a file that is too large.
YamlNode tree_of_file(const std::filesystem::path& file, std::span<const std::string> overrides);
/// Puts `text`, `key.path=value`, into the tree.
void apply_override(YamlNode& root, const std::string& text);
/// Where the value at `path` was said; where its nearest parent was when it was not said.
Origin origin_of(const YamlNode& root, std::string_view path, bool* said = nullptr);

}  // namespace orthrus::runtime::config_file
